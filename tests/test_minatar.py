import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from torch.func import functional_call, stack_module_state, vmap

from sb3_staq import StaQ
from sb3_staq.minatar import (
    FRAME_SCALE,
    MAX_EPISODE_STEPS,
    MinAtarCNN,
    MinAtarPolicy,
    MinAtarWrapper,
    register_envs,
)

# ... and how many of the six actions do something in them
GAMES = {"Asterix": 5, "Breakout": 3, "Freeway": 3, "Seaquest": 6, "SpaceInvaders": 4}


@pytest.fixture
def minatar():
    pytest.importorskip("minatar")
    register_envs()


def make(env_id: str, **kwargs) -> MinAtarWrapper:
    return MinAtarWrapper(gym.make(env_id, **kwargs))


def rollout(env: gym.Env, seed: int, n_steps: int = 300) -> tuple[np.ndarray, list[float]]:
    actions = np.random.default_rng(0).integers(env.action_space.n, size=n_steps)
    obs, _ = env.reset(seed=seed)
    observations, rewards = [obs], []
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            obs, _ = env.reset()
        observations.append(obs)
        rewards.append(float(reward))
    return np.stack(observations), rewards


def test_registration_is_repeatable(minatar, recwarn):
    specs = {env_id: spec for env_id, spec in gym.registry.items() if env_id.startswith("MinAtar/")}
    register_envs()
    assert set(specs) == {f"MinAtar/{game}-v{version}" for game in GAMES for version in (0, 1)}
    assert all(gym.registry[env_id] is spec for env_id, spec in specs.items())
    assert not recwarn.list


def test_registration_after_minatars_own():
    pytest.importorskip("minatar")
    # In a process of its own: registration is global
    code = """
import warnings
warnings.simplefilter("error")
import gymnasium as gym
from minatar.gym import register_envs as own_register_envs
own_register_envs()
from sb3_staq.minatar import MAX_EPISODE_STEPS, register_envs
register_envs()
assert gym.spec("MinAtar/Seaquest-v0").max_episode_steps == MAX_EPISODE_STEPS
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_works_without_minatar(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    registry = {}
    monkeypatch.setattr(gym.envs.registration, "registry", registry)
    monkeypatch.setattr(gym, "registry", registry)
    register_envs()
    assert registry == {}


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("version", [0, 1])
def test_passes_sb3_check(minatar, game, version):
    env = make(f"MinAtar/{game}-v{version}", render_mode="rgb_array")
    check_env(env)
    assert env.action_space == spaces.Discrete(6 if version == 0 else GAMES[game])
    raw = env.unwrapped.observation_space.shape
    assert env.observation_space.shape == (raw[2], raw[0], raw[1])


@pytest.mark.parametrize("game", GAMES)
def test_seeding_is_reproducible(minatar, game):
    """Also in an environment that has been played before, and not because the game ignores the seed."""
    env = make(f"MinAtar/{game}-v1")
    obs, rewards = rollout(env, seed=3)
    other_obs, _ = rollout(env, seed=4)
    assert not np.array_equal(obs, other_obs)
    # Leave a sticky action behind
    env.unwrapped.game.last_action = env.unwrapped.action_set[-1]
    for used_or_new in (env, make(f"MinAtar/{game}-v1")):
        obs_again, rewards_again = rollout(used_or_new, seed=3)
        np.testing.assert_array_equal(obs, obs_again)
        assert rewards == rewards_again


def test_sticky_action_does_not_outlive_a_seed(minatar):
    env = make("MinAtar/Breakout-v1")
    first_actions = []
    for last_action in (0, 3):
        env.unwrapped.game.last_action = last_action
        env.reset(seed=0)
        first_actions.append(env.unwrapped.game.last_action)
    assert first_actions == [0, 0]


def test_observations_are_the_transposed_state(minatar):
    env = make("MinAtar/Seaquest-v1")
    obs, _ = env.reset(seed=0)
    np.testing.assert_array_equal(obs, env.unwrapped.game.state().transpose(2, 0, 1))
    assert obs.dtype == np.bool_ and obs.flags.c_contiguous


def test_time_limit(minatar):
    env = gym.make("MinAtar/SpaceInvaders-v1")
    assert env.spec.max_episode_steps == MAX_EPISODE_STEPS
    env = gym.make("MinAtar/SpaceInvaders-v1", max_episode_steps=3)
    env.reset(seed=0)
    assert [env.step(0)[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]


def test_rendering(minatar):
    env = make("MinAtar/Breakout-v1", render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame.dtype == np.uint8 and frame.shape == (10 * FRAME_SCALE, 10 * FRAME_SCALE, 3)
    cells = frame[::FRAME_SCALE, ::FRAME_SCALE]
    # Every pixel of a cell has its color, empty cells are black, and the full color range is in use
    np.testing.assert_array_equal(frame, np.kron(cells, np.ones((FRAME_SCALE, FRAME_SCALE, 1), dtype=np.uint8)))
    np.testing.assert_array_equal(cells.any(axis=2), env.unwrapped.game.state().any(axis=2))
    assert frame.max() > 200


def test_cnn_in_vmap():
    space = spaces.Box(0, 1, shape=(4, 10, 10), dtype=np.bool_)
    networks = [MinAtarCNN(space) for _ in range(3)]
    obs = th.as_tensor(np.stack([space.sample() for _ in range(5)])).float()
    params, buffers = stack_module_state(networks)
    stacked = vmap(lambda p, b, x: functional_call(networks[0], (p, b), (x,)), (0, 0, None))(params, buffers, obs)
    assert stacked.shape == (3, 5, networks[0].features_dim) == (3, 5, 16 * 8 * 8)
    for output, network in zip(stacked, networks, strict=True):
        th.testing.assert_close(output, network(obs))


@pytest.mark.parametrize("n_envs", [1, 2])
def test_training(minatar, tmp_path, n_envs):
    env = make_vec_env("MinAtar/Breakout-v1", n_envs=n_envs, seed=0, wrapper_class=MinAtarWrapper)
    model = StaQ(
        MinAtarPolicy,
        env,
        policy_kwargs=dict(net_arch=[128]),
        buffer_size=1000,
        learning_starts=50,
        batch_size=32,
        memory_size=3,
        policy_update_interval=50,
        seed=0,
    )
    model.learn(200)
    assert model.policy.features_extractor_class is MinAtarCNN
    model.save(tmp_path / "model")
    loaded = StaQ.load(tmp_path / "model", env=env)
    obs = env.reset()
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
