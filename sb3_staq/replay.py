"""Batches of transitions with ``log pi(.|s')`` as a field, and the two ways to compute it.

*Direct*: the stack is evaluated at every sampled next state. *Cached*: its weighted sums are cached, see
:mod:`sb3_staq.logit_cache`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecNormalize

from sb3_staq.logit_cache import LogitCache, cache_fits
from sb3_staq.main_effects import SampledActions, sample_actions
from sb3_staq.mirror_descent import PolicyUpdate
from sb3_staq.observations import map_fields, select
from sb3_staq.policies import StaQPolicy
from sb3_staq.q_networks import CriticEnsemble

# Replayed states at which a policy update is measured; gradient steps draw at most this many, or one batch, at a time
STATES_AT_ONCE = 1024
# ... and at most this many elements of preprocessed observations
SAMPLE_ELEMENTS = 2**24


class ReplayBatch(NamedTuple):
    """A batch from one of SB3's replay buffers, with the policy at the next states."""

    observations: PyTorchObs
    actions: th.Tensor
    next_observations: PyTorchObs
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None
    next_log_prob: th.Tensor  # log pi(.|s'), shape (batch, n_bins)
    next_actions: SampledActions | None  # drawn from the policy, for state-action critics

    def split(self, batch_size: int) -> "Iterator[ReplayBatch]":
        """Split the batch into views of ``batch_size`` transitions, of which the last may have fewer."""
        for start in range(0, len(self.rewards), batch_size):
            rows, drawn = slice(start, start + batch_size), self.next_actions
            yield ReplayBatch(
                select(self.observations, rows),
                self.actions[rows],
                select(self.next_observations, rows),
                self.dones[rows],
                self.rewards[rows],
                None if self.discounts is None else self.discounts[rows],
                self.next_log_prob[rows],
                None if drawn is None else SampledActions(*[x[rows] for x in drawn]),
            )


class PolicyReplay:
    """
    A replay buffer of SB3, any of them, as the training sees it.

    :param vec_normalize: the wrapper that normalises the sampled transitions, if any
    :param cached: whether to cache the weighted sums
    """

    def __init__(self, buffer: ReplayBuffer, policy: StaQPolicy, vec_normalize: VecNormalize | None, cached: bool):
        self.buffer = buffer
        self.policy = policy
        self.vec_normalize = vec_normalize
        self.cache = LogitCache(policy, buffer.buffer_size * buffer.n_envs) if cached else None
        self.states_at_once = max(1, min(STATES_AT_ONCE, SAMPLE_ELEMENTS // max(1, policy.n_obs_elements)))

    def logit_sums(self, obs: PyTorchObs, remember: bool = True) -> th.Tensor:
        """
        Return the weighted sums ``S`` of the stack.

        :param remember: whether to cache what was evaluated
        :return: shape (batch, n_bins)
        """
        with th.no_grad():
            return self.policy.logit_sums(obs) if self.cache is None else self.cache.logit_sums(obs, remember)

    def remember_last(self) -> None:
        """Cache the sums at the next states that the buffer has stored last, for all environments in one pass."""
        buffer = self.buffer
        if self.cache is None:
            return
        arrays = buffer.observations if buffer.optimize_memory_usage else buffer.next_observations
        row = buffer.pos if buffer.optimize_memory_usage else (buffer.pos - 1) % buffer.buffer_size
        obs = select(arrays, row)
        if self.vec_normalize is not None:
            obs = self.vec_normalize.normalize_obs(obs)
        self.logit_sums(map_fields(buffer.to_torch, obs))

    def batches(self, n_batches: int, batch_size: int) -> Iterator[ReplayBatch]:
        """Draw batches. The policy is fixed meanwhile, so several are drawn and evaluated at once."""
        # Samples of other buffers cannot be split into batches: HER's end with the relabelled transitions
        if not is_plain(self.buffer):
            yield from (self.sample(batch_size) for _ in range(n_batches))
            return
        n_at_once = max(1, self.states_at_once // batch_size)
        for start in range(0, n_batches, n_at_once):
            yield from self.sample(min(n_at_once, n_batches - start) * batch_size).split(batch_size)

    @th.no_grad()
    def sample(self, batch_size: int) -> ReplayBatch:
        """
        Draw one batch.

        :raise ValueError: if a number in it is not finite, before anything is learnt from it
        """
        samples = self._sample(batch_size)
        log_prob = self.policy.log_prob(self.logit_sums(samples.next_observations))
        drawn = None if self.policy.main_effects is None else sample_actions(self.policy.branches, log_prob)
        stored: Any = {name: getattr(samples, name, None) for name in ReplayBatch._fields[:6]}  # discounts: n-step only
        return ReplayBatch(**stored, next_log_prob=log_prob, next_actions=drawn)

    def sample_states(self, n_least: int) -> tuple[PyTorchObs, th.Tensor]:
        """
        Draw states at which to measure the policy update: as many draws as states are stored, up to ``states_at_once``.

        :param n_least: the least number of states
        :return: next observations, and the weighted sums there, shape (n_states, n_bins)
        :raise ValueError: if a number in the batch is not finite
        """
        n_stored = self.buffer.size() * (self.buffer.n_envs if is_plain(self.buffer) else 1)
        states = self._sample(max(n_least, min(self.states_at_once, n_stored))).next_observations
        return states, self.logit_sums(states)

    def _sample(self, batch_size: int) -> Any:
        samples = self.buffer.sample(batch_size, env=self.vec_normalize)
        for name in ("rewards", "observations", "actions", "next_observations", "dones"):
            _check_finite(name, getattr(samples, name))
        return samples

    def follow(self, update: PolicyUpdate, deleted: Sequence[CriticEnsemble]) -> None:
        """Bring the cache up to date after a policy update."""
        if self.cache is not None:
            with th.no_grad():
                self.cache.follow(update, self.policy.frozen_critics.newest, deleted)


def _check_finite(name: str, values: Any) -> None:
    for key, x in values.items() if isinstance(values, dict) else [("", values)]:
        if x.is_floating_point() and not th.isfinite(x).all():
            what = f"{name}[{key!r}]" if key else name
            entry = tuple((~th.isfinite(x)).nonzero()[0].tolist())
            raise ValueError(
                f"Invalid {what} in a batch of the replay buffer: expected finite numbers, got {x[entry].item()} in "
                f"{entry}. They may come from compute_reward of the environment (HER), from VecNormalize or from "
                "editing the replay buffer. Nothing was learnt from them"
            )


def is_plain(buffer: ReplayBuffer) -> bool:
    """
    Return whether a buffer returns transitions as stored, so that the same states come again.

    SB3's own buffers do, except HER's; a subclass may relabel its transitions.
    """
    return type(buffer) in (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)


def cache_pays(
    buffer: ReplayBuffer, policy: StaQPolicy, vec_normalize: VecNormalize | None, n_sampled: float | None
) -> bool:
    """
    Decide ``logit_cache="auto"``: per policy update, two critics at all stored states or M at the sampled ones.

    :param n_sampled: number of states that are sampled between two policy updates; None if it is not known
    :return: whether the cache costs less, and fits into the memory that it may take
    """
    weights = policy.frozen_critics.weights
    normalised = vec_normalize is not None and vec_normalize.norm_obs
    if not weights.recursive or normalised or not is_plain(buffer) or not cache_fits(buffer, policy.branches.n_bins):
        return False
    if weights.logit_rule == "exact" or n_sampled is None:  # a stack without limit
        return True
    return 2 * buffer.buffer_size * buffer.n_envs <= policy.memory_size * n_sampled
