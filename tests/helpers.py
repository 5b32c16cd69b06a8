"""Small models and environments, and evaluations of a policy that share no code with the package's batched ones."""

import copy

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import preprocess_obs

from sb3_staq import StaQ
from sb3_staq.q_networks import CriticEnsemble, QNetwork

# Everything that decides a result is here, so that tests do not depend on the defaults
SMALL = dict(
    learning_rate=0.01,
    buffer_size=300,
    learning_starts=20,
    batch_size=16,
    tau=1.0,
    gamma=0.99,
    train_freq=1,
    gradient_steps=-1,
    memory_size=4,
    logit_rule="weight_corrected",
    policy_update_interval=10,
    n_critics=2,
    critic="additive",
    critic_reduction="mean",
    target_update_interval=5,
    eval_policy="last",
    kl_coef=1.0,
    ent_coef=0.1,
    exploration_fraction=0.1,
    exploration_initial_eps=0.05,
    exploration_final_eps=0.05,
    reward_scale=1.0,
    seed=0,
    device="cpu",
)


def make_model(env="CartPole-v1", policy="MlpPolicy", net_arch=(16,), policy_kwargs=None, **kwargs) -> StaQ:
    """A model that is quick to train; arguments as of StaQ."""
    policy_kwargs = dict(net_arch=list(net_arch), **(policy_kwargs or {}))
    return StaQ(policy, env, policy_kwargs=policy_kwargs, **{**SMALL, **kwargs})


class RandomObsEnv(gym.Env):
    """
    Random observations, every one different; episodes end by termination or truncation at random, and at the latest by
    truncation after ``ep_length`` steps. The reward is 1 if the (first component of the) action tells whether the first
    number of the observation is above 0.

    :param kind: of the observations: "box", "dict", "discrete" or "image"
    :param action_space: Discrete by default, with n_actions and start
    """

    def __init__(self, kind="box", ep_length=8, n_actions=3, start=0, action_space=None):
        self.observation_space = {
            "box": spaces.Box(-1, 1, (4,), np.float32),
            "dict": spaces.Dict(a=spaces.Box(-1, 1, (3,), np.float32), b=spaces.Discrete(5)),
            "discrete": spaces.Discrete(7),
            "image": spaces.Box(0, 255, (36, 36, 1), np.uint8),
        }[kind]
        self.action_space = spaces.Discrete(n_actions, start=start) if action_space is None else action_space
        self.ep_length = ep_length
        self.actions = []

    def _obs(self):
        self._last = self.observation_space.sample()
        return self._last

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self._obs(), {}

    def step(self, action):
        self.actions.append(np.asarray(action).tolist())
        self.steps += 1
        first = self._last["a"][0] if isinstance(self._last, dict) else np.ravel(self._last)[0]
        start = self.action_space.start if isinstance(self.action_space, spaces.Discrete) else 0
        reward = float((np.ravel(action)[0] > start) == (first > 0))
        terminated = self.np_random.random() < 0.1
        truncated = self.np_random.random() < 0.05 or self.steps >= self.ep_length
        return self._obs(), reward, bool(terminated), bool(truncated), {}


class OneStateEnv(gym.Env):
    """One state, reward 1, and every step ends the episode: by truncation or by termination."""

    observation_space = spaces.Box(0, 1, (2,), np.float32)

    def __init__(self, truncates, n_actions=2):
        self.truncates, self.action_space = truncates, spaces.Discrete(n_actions)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(2, np.float32), {}

    def step(self, action):
        return np.ones(2, np.float32), 1.0, not self.truncates, self.truncates, {}


def randomise(module: th.nn.Module, seed: int, std: float = 0.5) -> None:
    """Parameters as after a training that went somewhere: a new critic's last layer is zero."""
    generator = th.Generator().manual_seed(seed)
    with th.no_grad():
        for param in module.parameters():
            param.copy_(std * th.randn(param.shape, generator=generator))


def grow(model: StaQ, n: int, seed: int = 0, ent_coef: float = 0.1) -> None:
    """Push n different random critics onto the stack of a model whose replay buffer is empty."""
    for i in range(n):
        randomise(model.policy.critics, seed + i)
        model.policy.push_critics(1.0, ent_coef)


def members(ensemble: CriticEnsemble) -> list[QNetwork]:
    """The critics of an ensemble as ordinary networks with parameters of their own."""
    stacked = dict(ensemble.net.named_parameters())
    nets = []
    for i in range(len(next(iter(stacked.values())))):
        net = copy.deepcopy(ensemble.net)
        for name, param in net.named_parameters():
            param.data = stacked[name].data[i].clone()
        nets.append(net.train(ensemble.net.training))
    return nets


def slow_q_values(ensemble: CriticEnsemble, obs, dtype=th.float64) -> th.Tensor:
    """Q-values of an ensemble at preprocessed observations, one ordinary network after the other."""

    def cast(x):
        return {key: value.to(dtype) for key, value in x.items()} if isinstance(x, dict) else x.to(dtype)

    with th.no_grad():
        values = th.stack([net.to(dtype)(cast(obs)) for net in members(ensemble)])
    return values.mean(0)


def slow_logit_sums(policy, obs, dtype=th.float64) -> th.Tensor:
    """The weighted sum of the frozen critics, one ordinary network after the other, in double precision."""
    obs = preprocess_obs(obs, policy.observation_space, normalize_images=policy.normalize_images)
    first = next(iter(obs.values())) if isinstance(obs, dict) else obs
    total = th.zeros(len(first), policy.branches.n_bins, dtype=dtype)
    for weight, entry in zip(policy.frozen_critics.weights.values, by_age(policy), strict=True):
        total += weight * slow_q_values(entry, obs, dtype)
    return total


def by_age(policy) -> list[CriticEnsemble]:
    """The frozen critics that the logit rule weights, oldest first."""
    stack = policy.frozen_critics
    newest_first = sorted(range(len(stack)), key=lambda i: -stack.updates[i])
    return [stack[i] for i in newest_first[: len(stack.weights)]][::-1]


def slow_average(policy, obs, dtype=th.float64) -> th.Tensor:
    """The plain mean of the frozen critics of the window, one ordinary network after the other."""
    obs = preprocess_obs(obs, policy.observation_space, normalize_images=policy.normalize_images)
    stack = policy.frozen_critics
    covered = max(1, round(stack.average_window * stack.n_updates))
    stride = 1
    while covered / stride > stack.average_size:
        stride *= 2
    kept = [
        stack[i]
        for i, update in enumerate(stack.updates)
        if update > stack.n_updates - covered and update % stride == 0
    ]
    return th.stack([slow_q_values(entry, obs, dtype) for entry in kept]).mean(0)


def slow_log_policy(policy, logits: th.Tensor) -> th.Tensor:
    """Log-probabilities of the bins, branch after branch."""
    parts, start = [], 0
    for size in policy.branches.sizes:
        branch = logits[..., start : start + size]
        parts.append(branch - branch.exp().sum(-1, keepdim=True).log())
        start += size
    assert start == logits.shape[-1]
    return th.cat(parts, dim=-1)


def relative_error(actual: th.Tensor, expected: th.Tensor) -> float:
    """Largest deviation relative to the largest expected value."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def sample_obs(space: spaces.Space, n: int, seed: int = 0):
    """A batch of observations as tensors, as a replay buffer hands them out (images channel-first)."""
    space.seed(seed)

    def tensor(space, samples):
        array = np.stack([np.asarray(sample) for sample in samples])
        return th.as_tensor(array.reshape(n, -1) if isinstance(space, spaces.Discrete) else array)

    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: tensor(sub, [sample[key] for sample in samples]) for key, sub in space.spaces.items()}
    return tensor(space, samples)
