"""Batches of transitions with ``log pi(.|s')`` as a field, and the two ways to get it.

*Direct*: the stack is evaluated at every sampled next state. *Cached*: its weighted sum is remembered by the content of
the state. Between two policy updates the policy is fixed, and an update changes a sum by the newest and the deleted
critic only (see :mod:`sb3_staq.mirror_descent`), so what is remembered follows for two passes instead of M: M does not
cost M. A state that was edited, relabelled or added by others has other content, and is evaluated anew.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecNormalize

from sb3_staq.main_effects import SampledActions, sample_actions
from sb3_staq.mirror_descent import PolicyUpdate
from sb3_staq.policies import StaQPolicy
from sb3_staq.q_networks import CriticEnsemble

# Replayed states that a policy update is measured with; gradient steps draw at most so many at a time
STATES_AT_ONCE = 1024
# ... and at most so many elements of observations
SAMPLE_ELEMENTS = 2**24
# Remembered states that follow a policy update at a time
FOLLOW_ROWS = 4096
# With logit_cache="auto", the cache takes at most so many bytes and half of what the replay buffer takes
CACHE_BYTES = 2**28
# What Python's dictionary takes for one state
BYTES_PER_KEY = 150
# Spreads the bits of a word over 64: 2^64 over the golden ratio
SPREAD = np.uint64(0x9E3779B97F4A7C15)


class ReplayBatch(NamedTuple):
    """A batch of SB3's replay buffers with what the policy says of the next states."""

    observations: PyTorchObs
    actions: th.Tensor
    next_observations: PyTorchObs
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None
    next_log_prob: th.Tensor  # log pi(.|s'), shape (batch, n_bins)
    next_actions: SampledActions | None  # drawn from it, for state-action critics

    def split(self, batch_size: int) -> "Iterator[ReplayBatch]":
        """
        Split the batch.

        :param batch_size: number of transitions per part
        :return: views of the parts
        """
        for start in range(0, len(self.rewards), batch_size):
            yield _rows(self, slice(start, start + batch_size))


def _map(function: Callable[..., Any], *fields: Any) -> Any:
    """Apply a function to fields of the same structure, which may be tensors, dictionaries, tuples, or None."""
    first = fields[0]
    if isinstance(first, dict):
        return {key: _map(function, *(field[key] for field in fields)) for key in first}
    if isinstance(first, tuple):
        parts = [_map(function, *part) for part in zip(*fields, strict=True)]
        return type(first)._make(parts) if hasattr(first, "_make") else tuple(parts)  # type: ignore[attr-defined]
    return None if first is None else function(*fields)


def _rows(fields: Any, rows: Any) -> Any:
    return _map(lambda x: x[rows], fields)


def first_rows(obs: PyTorchObs, n: int) -> PyTorchObs:
    """
    Take the first of some observations.

    :param obs: a tensor or a dictionary of tensors
    :param n: how many
    :return: views of them
    """
    return _rows(obs, slice(n))


@cache
def _multipliers(n_words: int) -> np.ndarray:
    """Odd numbers for a multilinear hash, the same in every process."""
    return np.random.default_rng(n_words).integers(2**64, size=n_words, dtype=np.uint64) | np.uint64(1)


def _words(tensor: th.Tensor) -> np.ndarray:
    """The bytes of each row as unsigned integers."""
    rows = np.ascontiguousarray(tensor.detach().cpu().numpy()).reshape(len(tensor), -1).view(np.uint8)
    if rows.shape[1] % 4:
        rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))
    return rows.view(np.uint32)


def fingerprints(obs: PyTorchObs) -> list[int]:
    """
    Hash observations by their content.

    :param obs: a tensor or a dictionary of tensors
    :return: 64 bits for each
    """
    parts = [_words(tensor) for tensor in (obs.values() if isinstance(obs, dict) else [obs])]
    words = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    # Changes of high bits, such as signs, must reach the low ones, or only these few would tell the sums apart
    mixed = words * SPREAD
    mixed ^= mixed >> np.uint64(32)
    return (mixed @ _multipliers(words.shape[1])).tolist()


class LogitCache:
    """
    Remember the weighted sums ``S(s)`` of the stack by the content of the states.

    :param policy: whose stack is evaluated
    :param capacity: number of states; the oldest are forgotten
    """

    def __init__(self, policy: StaQPolicy, capacity: int):
        self.policy = policy
        self.capacity = capacity
        self._slots: dict[int, int] = {}  # by fingerprint
        self._keys: list[int | None] = []  # the fingerprint in each slot
        self._next = 0  # the slot to write to
        self._obs: Any = None
        self._sums = th.zeros(0)
        self._version: int | None = None  # of the stack that the sums are of

    def __len__(self) -> int:
        return len(self._slots)

    def clear(self) -> None:
        """Forget everything."""
        self._slots, self._keys, self._next = {}, [], 0

    def logit_sums(self, obs: PyTorchObs, remember: bool = True) -> th.Tensor:
        """
        Give the weighted sums, evaluating the stack where they are not known.

        :param obs: observations
        :param remember: whether to remember what was evaluated
        :return: shape (batch, n_bins)
        """
        if self._version != self.policy.frozen_critics.version:
            self.clear()
            self._version = self.policy.frozen_critics.version
        keys = fingerprints(obs)
        slots = [self._slots.get(key, -1) for key in keys]
        unknown = [i for i, slot in enumerate(slots) if slot < 0]
        if len(unknown) == len(keys):
            sums = self.policy.logit_sums(obs)
        else:
            sums = self._sums[th.tensor(slots, device=self._sums.device)]
            if unknown:
                sums[unknown] = self.policy.logit_sums(_rows(obs, unknown))
        if remember and unknown:
            self._remember([keys[i] for i in unknown], _rows(obs, unknown), sums[unknown])
        return sums

    def _remember(self, keys: list[int], obs: Any, sums: th.Tensor) -> None:
        if self._obs is None:
            self._obs, self._sums = _map(lambda x: x.new_empty(self.capacity, *x.shape[1:]), (obs, sums))
        row_of = dict(zip(keys, range(len(keys)), strict=True))  # each state once
        row_of = dict(list(row_of.items())[-self.capacity :])
        slots = [(self._next + i) % self.capacity for i in range(len(row_of))]
        self._next = (self._next + len(slots)) % self.capacity
        self._keys += [None] * (max(slots) + 1 - len(self._keys))
        for slot in slots:
            self._slots.pop(self._keys[slot], None)  # type: ignore[arg-type]
            self._keys[slot] = None
        index = th.tensor(slots, device=sums.device)
        new_obs, new_sums = _rows((obs, sums), list(row_of.values()))
        self._sums[index] = new_sums
        _map(lambda room, x: room.index_copy_(0, index, x), self._obs, new_obs)
        for key, slot in zip(row_of, slots, strict=True):
            self._keys[slot], self._slots[key] = key, slot

    def follow(self, update: PolicyUpdate, newest: CriticEnsemble, deleted: Sequence[CriticEnsemble]) -> None:
        """
        Bring all that is remembered up to date after a policy update. If it is interrupted, all is forgotten.

        :param update: what the update does to the weighted sums
        :param newest: the critics that it pushed
        :param deleted: the critics that it deleted
        """
        policy, was_current = self.policy, self._version == self.policy.frozen_critics.version - 1
        self._version = None
        if not was_current:
            return
        for start in range(0, len(self._keys), FOLLOW_ROWS):
            rows = slice(start, min(start + FOLLOW_ROWS, len(self._keys)))
            obs = _rows(self._obs, rows)
            of_deleted = [policy.q_values(critics, obs) for critics in deleted]
            self._sums[rows] = update.apply(self._sums[rows], policy.q_values(newest, obs), of_deleted)
        self._version = policy.frozen_critics.version

    def state_dict(self) -> dict[str, np.ndarray]:
        """Give all that is remembered as arrays, with a digest of the stack that it belongs to."""
        n = len(self._keys)
        obs = self._obs if isinstance(self._obs, dict) else {"": self._obs}
        if n == 0 or None in self._keys or self._version != self.policy.frozen_critics.version:
            return {}
        return {
            **{f"obs:{name}": x[:n].cpu().numpy() for name, x in obs.items()},
            "sums": self._sums[:n].cpu().numpy(),
            "keys": np.array(self._keys, dtype=np.uint64),
            "next": np.array(self._next),
            "stack": np.frombuffer(stack_digest(self.policy), dtype=np.uint8),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """
        Take what :meth:`state_dict` gave, if it belongs to the policy's stack.

        :param state: arrays
        """
        self.clear()
        matches = state and state["stack"].tobytes() == stack_digest(self.policy)
        if not matches or len(state["keys"]) > self.capacity:
            return
        n, device = len(state["keys"]), self.policy.device
        room = {}
        for name, array in state.items():
            if name == "sums" or name.startswith("obs:"):
                values = th.as_tensor(array)
                room[name] = th.empty(self.capacity, *values.shape[1:], dtype=values.dtype, device=device)
                room[name][:n] = values.to(device)
        self._sums = room.pop("sums")
        self._obs = room["obs:"] if "obs:" in room else {name.removeprefix("obs:"): x for name, x in room.items()}
        self._keys = state["keys"].tolist()
        self._slots = {key: slot for slot, key in enumerate(state["keys"].tolist())}
        self._next = int(state["next"])
        self._version = self.policy.frozen_critics.version


def stack_digest(policy: StaQPolicy) -> bytes:
    """
    Hash the stack of a policy.

    :param policy: the policy
    :return: 32 bytes
    """
    digest = hashlib.sha256()
    for tensor in policy.frozen_critics.state_dict().values():
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.digest()


class PolicyReplay:
    """
    A replay buffer as the training sees it.

    :param buffer: any replay buffer of SB3
    :param policy: the policy
    :param vec_normalize: what normalises the sampled transitions, if anything does
    :param cached: whether to remember the weighted sums
    """

    def __init__(self, buffer: ReplayBuffer, policy: StaQPolicy, vec_normalize: VecNormalize | None, cached: bool):
        self.buffer = buffer
        self.policy = policy
        self.vec_normalize = vec_normalize
        self.cache = LogitCache(policy, buffer.buffer_size * buffer.n_envs) if cached else None
        shapes = buffer.obs_shape.values() if isinstance(buffer.obs_shape, dict) else [buffer.obs_shape]
        elements = sum(int(np.prod(shape)) for shape in shapes)
        self.states_at_once = max(1, min(STATES_AT_ONCE, SAMPLE_ELEMENTS // max(1, elements)))

    def logit_sums(self, obs: PyTorchObs, remember: bool = True) -> th.Tensor:
        """
        Give the weighted sums ``S`` of the stack.

        :param obs: observations
        :param remember: whether to remember what was evaluated
        :return: shape (batch, n_bins)
        """
        with th.no_grad():
            return self.policy.logit_sums(obs) if self.cache is None else self.cache.logit_sums(obs, remember)

    def remember_last(self) -> None:
        """Evaluate the sums at the next states of what the buffer has stored last, all environments in one pass."""
        buffer = self.buffer
        if self.cache is None:
            return
        arrays = buffer.observations if buffer.optimize_memory_usage else buffer.next_observations
        row = buffer.pos if buffer.optimize_memory_usage else (buffer.pos - 1) % buffer.buffer_size
        obs = _map(lambda array: array[row], arrays)
        if self.vec_normalize is not None:
            obs = self.vec_normalize.normalize_obs(obs)
        self.logit_sums(_map(buffer.to_torch, obs))

    def batches(self, n_batches: int, batch_size: int) -> Iterator[ReplayBatch]:
        """
        Draw batches. The policy is fixed meanwhile, so several are drawn and evaluated at once.

        :param n_batches: number of batches
        :param batch_size: number of transitions per batch
        :return: the batches
        """
        # What other buffers give may be no set of equals: HER's ends with the relabelled transitions
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

        :param batch_size: number of transitions
        :return: the batch
        :raise ValueError: if a number in it is not finite, before anything is learnt from it
        """
        samples = self.buffer.sample(batch_size, env=self.vec_normalize)
        for name in ("rewards", "observations", "actions", "next_observations"):
            _check_finite(name, getattr(samples, name))
        log_prob = self.policy.log_prob(self.logit_sums(samples.next_observations))
        drawn = None if self.policy.main_effects is None else sample_actions(self.policy.branches, log_prob)
        return ReplayBatch(
            samples.observations,
            samples.actions,
            samples.next_observations,
            samples.dones,
            samples.rewards,
            getattr(samples, "discounts", None),
            log_prob,
            drawn,
        )

    def follow(self, update: PolicyUpdate, deleted: Sequence[CriticEnsemble]) -> None:
        """
        Take note of a policy update.

        :param update: what it does to the weighted sums
        :param deleted: the critics that it deleted from them
        """
        if self.cache is not None:
            with th.no_grad():
                self.cache.follow(update, self.policy.frozen_critics.newest, deleted)


def _check_finite(name: str, values: Any) -> None:
    for key, x in values.items() if isinstance(values, dict) else [("", values)]:
        if x.is_floating_point() and not th.isfinite(x).all():
            what = f"{name}[{key!r}]" if key else name
            raise ValueError(
                f"Invalid {what} in a batch of the replay buffer: expected finite numbers. They may come from "
                "compute_reward of the environment (HER), from VecNormalize or from a loaded replay buffer. Nothing "
                "was learnt from them"
            )


def is_plain(buffer: ReplayBuffer) -> bool:
    """
    Tell whether a buffer hands out what is stored in it, so that its states come again.

    :param buffer: a replay buffer
    :return: True for SB3's own but for HER's; a subclass may relabel its transitions
    """
    return type(buffer) in (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)


def cache_fits(buffer: ReplayBuffer, n_bins: int) -> bool:
    """
    Tell whether ``logit_cache="auto"`` may take the memory that the cache needs.

    :param buffer: the replay buffer
    :param n_bins: number of columns of the logits
    :return: whether it takes at most ``CACHE_BYTES`` and half of what the buffer takes
    """
    arrays = buffer.observations if isinstance(buffer.observations, dict) else {"": buffer.observations}
    next_arrays = {} if buffer.optimize_memory_usage else arrays
    n_states = buffer.buffer_size * buffer.n_envs
    observations = sum(array.nbytes for array in arrays.values())
    needed = observations + n_states * (4 * n_bins + BYTES_PER_KEY)
    return needed <= CACHE_BYTES + (observations + sum(array.nbytes for array in next_arrays.values())) // 2
