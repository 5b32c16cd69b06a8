"""Policies of many architectures, and stacks of random critics."""

import numpy as np
import torch as th
from gymnasium import spaces
from helpers import members, randomise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_staq import CnnPolicy, MlpPolicy, MultiInputPolicy


class NormExtractor(BaseFeaturesExtractor):
    """A features extractor with parameters of its own, one layer without bias, and dropout."""

    def __init__(self, observation_space, features_dim=6):
        super().__init__(observation_space, features_dim)
        n = int(np.prod(observation_space.shape))
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(n, 6, bias=False), nn.LayerNorm(6), nn.Dropout(0.5))

    def forward(self, obs):
        return self.net(obs)


class RecurrentExtractor(BaseFeaturesExtractor):
    """What PyTorch cannot batch over networks: a recurrent layer, and writing in place."""

    def __init__(self, observation_space, features_dim=5):
        super().__init__(observation_space, features_dim)
        self.gru = nn.GRU(2, 5, batch_first=True)

    def forward(self, obs):
        features = th.zeros(len(obs), 5)
        features += self.gru(obs.unflatten(1, (2, 2)))[1][0]
        return features


BOX = spaces.Box(-1, 1, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
DICT = spaces.Dict(img=IMAGE, vec=spaces.Box(-2, 2, (3,), np.float64), kind=spaces.Discrete(4))
ARCHITECTURES = {
    "mlp": (MlpPolicy, BOX, dict(net_arch=[16, 8])),
    "wide_input": (MlpPolicy, spaces.Box(-1, 1, (3, 40), np.float32), dict(net_arch=[8])),
    "linear": (MlpPolicy, BOX, dict(net_arch=[])),
    "tanh": (MlpPolicy, BOX, dict(net_arch=[8], activation_fn=nn.Tanh)),
    "prelu": (MlpPolicy, BOX, dict(net_arch=[8, 8], activation_fn=nn.PReLU)),
    "one_critic": (MlpPolicy, BOX, dict(net_arch=[8], n_critics=1)),
    "three_critics": (MlpPolicy, BOX, dict(net_arch=[8], n_critics=3)),
    "extractor": (MlpPolicy, BOX, dict(net_arch=[8], features_extractor_class=NormExtractor)),
    "recurrent": (MlpPolicy, BOX, dict(net_arch=[8], features_extractor_class=RecurrentExtractor)),
    "layer_norm": (MlpPolicy, BOX, dict(net_arch=[16, 8], layer_norm=True)),
    "discrete": (MlpPolicy, spaces.Discrete(5), dict(net_arch=[8])),
    "multi_discrete": (MlpPolicy, spaces.MultiDiscrete([3, 4]), dict(net_arch=[8])),
    "multi_binary": (MlpPolicy, spaces.MultiBinary(5), dict(net_arch=[8])),
    "image": (CnnPolicy, IMAGE, dict(features_extractor_kwargs=dict(features_dim=8))),
    "image_hidden": (CnnPolicy, IMAGE, dict(net_arch=[8], features_extractor_kwargs=dict(features_dim=8))),
    "dict": (MultiInputPolicy, DICT, dict(net_arch=[8], features_extractor_kwargs=dict(cnn_output_dim=8))),
    "branches": (MlpPolicy, BOX, dict(net_arch=[8, 8], action_space=spaces.MultiDiscrete([2, 3, 4]))),
    "branches_layer_norm": (
        MlpPolicy,
        BOX,
        dict(net_arch=[8, 8], action_space=spaces.MultiDiscrete([2, 3, 4]), layer_norm=True),
    ),
    "branches_linear": (MlpPolicy, BOX, dict(net_arch=[], action_space=spaces.MultiBinary(3))),
    "box_axis": (MlpPolicy, BOX, dict(net_arch=[8], action_space=spaces.Box(-1, 1, (3,)), action_grid="axis")),
    "main_effects": (MlpPolicy, BOX, dict(net_arch=[8], action_space=spaces.Box(-1, 1, (3,)), critic="joint")),
}


def make_policy(architecture="mlp", **kwargs):
    """A policy without a model, whose stack is empty and whose critics are random."""
    policy_class, space, policy_kwargs = ARCHITECTURES[architecture]
    policy_kwargs = {
        "action_space": spaces.Discrete(3),
        "memory_size": 4,
        "eval_policy": "last",
        **policy_kwargs,
        **kwargs,
    }
    th.manual_seed(0)
    policy = policy_class(space, lr_schedule=lambda _: 1e-3, **policy_kwargs)
    randomise(policy.additive_critics, seed=0)
    return policy


def push(policy, seed, kl_coef=1.0, ent_coef=0.1, memory_size=None):
    """Push random critics; return what they are, as ordinary networks."""
    randomise(policy.additive_critics, seed)
    nets = members(policy.additive_critics.frozen_copy())
    policy.push_critics(kl_coef, ent_coef, memory_size)
    return nets
