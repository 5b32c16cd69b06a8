"""A custom network: a features extractor, two hidden layers, another activation function."""

import sys

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_staq import StaQ

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000


class FourierFeatures(BaseFeaturesExtractor):
    """
    Sines and cosines of learnt projections.

    :param observation_space: observation space of the environment
    :param n_frequencies: number of projections
    """

    def __init__(self, observation_space: spaces.Box, n_frequencies: int = 32):
        super().__init__(observation_space, features_dim=2 * n_frequencies)
        self.projection = nn.Linear(observation_space.shape[0], n_frequencies)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """Map observations to features, shape (batch, features_dim)."""
        angles = self.projection(observations)
        return th.cat([angles.sin(), angles.cos()], dim=-1)


policy_kwargs = dict(
    features_extractor_class=FourierFeatures,
    features_extractor_kwargs=dict(n_frequencies=32),
    net_arch=[64, 64],
    activation_fn=nn.Tanh,
)
model = StaQ("MlpPolicy", "Acrobot-v1", policy_kwargs=policy_kwargs, seed=0)
model.learn(steps)
