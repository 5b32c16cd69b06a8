"""MinAtar for Stable-Baselines3: registration, a wrapper that makes its environments fit, and the usual network."""

import importlib.util
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_staq.policies import StaQPolicy

GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")
# MinAtar has no time limit of its own: an agent that never dies would stay in its first episode
MAX_EPISODE_STEPS = 5_000
# Pixels per cell of a rendered frame
FRAME_SCALE = 32


def register_envs() -> None:
    """
    Register the MinAtar games under the package's own ids, with a time limit.

    ``MinAtar/Breakout-v0`` has all six actions, ``MinAtar/Breakout-v1`` those that have an effect in the game. Does
    nothing if MinAtar is not installed.
    """
    if importlib.util.find_spec("minatar") is None:
        return
    for game in GAMES:
        for version in (0, 1):
            env_id = f"MinAtar/{game.title().replace('_', '')}-v{version}"
            if env_id not in gym.registry:
                gym.register(
                    env_id,
                    # Not imported before use, because MinAtar imports its plotting libraries
                    entry_point="minatar.gym:BaseEnv",
                    max_episode_steps=MAX_EPISODE_STEPS,
                    # It would complain about MinAtar's frames, which MinAtarWrapper fixes
                    disable_env_checker=True,
                    kwargs=dict(game=game, use_minimal_action_set=version == 1),
                )
            elif gym.registry[env_id].max_episode_steps is None:
                gym.registry[env_id].max_episode_steps = MAX_EPISODE_STEPS


class MinAtarWrapper(gym.Wrapper):
    """
    A wrapper that makes MinAtar an environment as SB3 expects it.

    Observations are channel-first (still booleans, so that the replay buffer stays small), rewards are of type float,
    the same seed gives the same episode, and video encoders accept the frames.

    :param env: a MinAtar environment
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Box)
        height, width, n_channels = env.observation_space.shape
        self.observation_space = spaces.Box(0, 1, shape=(n_channels, height, width), dtype=np.bool_)
        self.metadata = {**env.metadata, "render_fps": 15}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode."""
        if seed is not None:
            # The sticky action outlives the episode, even if there is a new seed
            self.unwrapped.game.last_action = 0  # type: ignore[attr-defined]
        obs, info = self.env.reset(seed=seed, options=options)
        return self._channel_first(obs), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take a step; the reward is a float."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._channel_first(obs), float(reward), terminated, truncated, info

    def render(self) -> Any:
        """Return the frame, enlarged if it is an array."""
        frame = self.env.render()
        if self.render_mode != "rgb_array":
            return frame
        # MinAtar draws one pixel per cell, with colors in [0, 1]
        pixels = (255 * np.asarray(frame)).round().astype(np.uint8)
        return pixels.repeat(FRAME_SCALE, axis=0).repeat(FRAME_SCALE, axis=1)

    @staticmethod
    def _channel_first(obs: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(obs.transpose(2, 0, 1))


class MinAtarCNN(BaseFeaturesExtractor):
    """
    One convolution: 16 filters of 3x3 and a ReLU. The hidden layer that usually follows is the policy's ``net_arch``.

    :param observation_space: channel-first, see :class:`MinAtarWrapper`
    """

    def __init__(self, observation_space: spaces.Box):
        n_channels, height, width = observation_space.shape
        super().__init__(observation_space, features_dim=16 * (height - 2) * (width - 2))
        self.cnn = nn.Sequential(nn.Conv2d(n_channels, 16, kernel_size=3), nn.ReLU(), nn.Flatten())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """Map observations to features, shape (batch, features_dim)."""
        return self.cnn(observations)


class MinAtarPolicy(StaQPolicy):
    """``StaQPolicy`` for observations from :class:`MinAtarWrapper`: ``MinAtarCNN`` by default."""

    default_features_extractor_class = MinAtarCNN
