"""The form in which the policy is exported: one module of tensors only, from observations to actions."""

import copy
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_staq.mirror_descent import log_policy
from sb3_staq.policies import StaQPolicy
from sb3_staq.q_networks import batched_forward


class ExportedPolicy(nn.Module):
    """
    The exported policy: from raw observations to actions, with one batched pass of the critics that act.

    :param policy: the policy, on the CPU
    :param vec_normalize: the statistics that normalise its observations, if any
    """

    def __init__(self, policy: StaQPolicy, vec_normalize: VecNormalize | None):
        super().__init__()
        self.space, self.normalize_images = policy.observation_space, policy.normalize_images
        self.action_space, self.branches = policy.action_space, policy.branches
        self.spaces: Any = self.space.spaces if isinstance(self.space, spaces.Dict) else {"obs": self.space}
        self.keys = list(self.spaces)
        stack = policy.frozen_critics
        used: Any = [x for x in zip(stack, stack.coefs(policy.eval_policy), strict=False) if x[1].any()]
        self.net = copy.deepcopy(stack.newest.net)  # the views would bring the whole stack into the file
        self.coef = th.cat([coef for _, coef in used]) * stack.weights.scale
        self.params = {name: th.cat([entry.params[name].detach() for entry, _ in used]) for name in used[0][0].params}
        self.vec_normalize = vec_normalize if vec_normalize is not None and vec_normalize.norm_obs else None
        self.statistics: dict[str, Any] = {}
        if self.vec_normalize is not None:
            rms: Any = self.vec_normalize.obs_rms
            self.statistics = rms if isinstance(rms, dict) else {"obs": rms}
        for key, rms in self.statistics.items():
            shape = self.spaces[key].shape
            if rms.mean.shape != shape:
                raise ValueError(f"Invalid vec_normalize: expected shape {shape} of {key!r}, got {rms.mean.shape}")

    def to_env(self, stored: th.Tensor) -> th.Tensor:
        """
        Scale stored actions to actions of the environment.

        :param stored: shape (batch, action_dim)
        :return: shape (batch, *action_space.shape)
        """
        if isinstance(self.action_space, spaces.Box):
            low, high = (th.as_tensor(x).flatten() for x in (self.action_space.low, self.action_space.high))
            stored = (low + 0.5 * (stored + 1.0) * (high - low)).maximum(low).minimum(high)
        return stored.reshape(-1, *self.action_space.shape)  # type: ignore[misc]

    def forward(self, *inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Compute actions and probabilities.

        :param inputs: observations, one tensor for each key
        :return: deterministic actions, sampled actions, and the probabilities of the bins
        """
        obs = dict(zip(self.keys, inputs, strict=True))
        for key, rms in self.statistics.items():
            std, clip = np.sqrt(rms.var + self.vec_normalize.epsilon), self.vec_normalize.clip_obs  # type: ignore
            # In double precision, as VecNormalize does: a mean may be large
            obs[key] = ((obs[key] - th.as_tensor(rms.mean)) / th.as_tensor(std)).clamp(-clip, clip).float()
        x = preprocess_obs(self._unnamed(obs), self.space, normalize_images=self.normalize_images)
        logits = batched_forward(self.net, self.params, x, coef=self.coef)
        log_prob = log_policy(logits, self.branches.sizes)
        stored = self.branches.deterministic(logits), self.branches.decode(self.branches.sample(log_prob))
        return self.to_env(stored[0]), self.to_env(stored[1]), log_prob.exp()

    def bins(self) -> list[Any]:
        """
        List the actions that the bins stand for.

        :return: the actions of the bins of each branch: numbers, or vectors if there is one branch of whole actions
        """
        n_bins = max(self.branches.sizes)
        bins = th.arange(n_bins).unsqueeze(1).minimum(self.branches.last)
        actions = self.to_env(self.branches.decode(bins)).reshape(n_bins, -1).T.tolist()
        if len(actions) != len(self.branches.sizes):
            return [np.transpose(actions).tolist()]
        return [values[:size] for values, size in zip(actions, self.branches.sizes, strict=True)]

    def draw_observations(self, n: int) -> list[np.ndarray]:
        """Draw ``n`` observations, an array for each input, from the space or around the statistics."""
        drawn = []
        for key, space in self.spaces.items():
            batch = batch_space(space, n)
            batch.seed(0)
            obs, is_float = np.asarray(batch.sample()), np.issubdtype(space.dtype, np.floating)
            if key in self.statistics:
                rms = self.statistics[key]
                obs = rms.mean + np.sqrt(rms.var) * np.random.default_rng(0).normal(size=obs.shape)
                obs = obs.clip(space.low, space.high)
            elif is_float:
                obs = obs.clip(-1e6, 1e6)
            drawn.append(obs.astype(np.float32 if is_float else space.dtype))
        return drawn

    def normalise(self, arrays: list[np.ndarray]) -> Any:
        """Normalise observations with SB3's own code, from an array for each input to what the policy takes."""
        obs = self._unnamed(dict(zip(self.keys, arrays, strict=True)))
        return obs if self.vec_normalize is None else self.vec_normalize.normalize_obs(obs)

    def _unnamed(self, obs: dict[str, Any]) -> Any:
        return obs if isinstance(self.space, spaces.Dict) else obs["obs"]
