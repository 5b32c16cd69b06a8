"""A cache of the stack's weighted sums at replayed states, keyed by the content of the states.

Between two policy updates the policy is fixed, and an update changes a sum only by the newest and the deleted critic
(see :mod:`sb3_staq.mirror_descent`). So updating the cache takes two passes, not M: a larger M costs no more. A state
that was edited, relabelled or added by other code has different content, and is evaluated by the whole stack.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_staq.mirror_descent import PolicyUpdate
from sb3_staq.observations import map_fields, select
from sb3_staq.policies import StaQPolicy
from sb3_staq.q_networks import CriticEnsemble

# Number of cached states updated at a time after a policy update
FOLLOW_ROWS = 4096
# With logit_cache="auto", the cache takes at most this many bytes more than half of the replay buffer
CACHE_BYTES = 2**28
# Memory that Python's dictionary takes per state
BYTES_PER_KEY = 150


def fingerprints(obs: PyTorchObs) -> list[int]:
    """Hash observations by their content: a 64-bit integer for each, which is another one in another process."""
    fields = [obs[key] for key in sorted(obs)] if isinstance(obs, dict) else [obs]
    arrays = [x.detach().cpu().numpy().reshape(len(x), -1) for x in fields]
    return list(map(hash, zip(*(map(np.ndarray.tobytes, rows) for rows in arrays), strict=True)))


class LogitCache:
    """
    A cache of the stack's weighted sums ``S(s)``, keyed by the content of the states.

    :param policy: the policy whose stack is evaluated
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
        self._version: int | None = None  # of the stack that the sums belong to

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._keys:  # of the process that pickled it
            keys = fingerprints(select(self._obs, slice(len(self._keys))))
            self._keys = [new if old is not None else None for old, new in zip(self._keys, keys, strict=True)]
            self._slots = {key: slot for slot, key in enumerate(self._keys) if key is not None}

    def __len__(self) -> int:
        return len(self._slots)

    def clear(self) -> None:
        """Forget everything."""
        self._slots, self._keys, self._next = {}, [], 0

    def logit_sums(self, obs: PyTorchObs, remember: bool = True) -> th.Tensor:
        """
        Return the weighted sums, shape (batch, n_bins), evaluating the stack where they are not cached.

        :param remember: whether to cache what was evaluated
        """
        if self._version != self.policy.frozen_critics.version:
            self.clear()
            self._version = self.policy.frozen_critics.version
        if self._obs is not None:  # environments may return other types than those of their spaces, which are stored
            obs = map_fields(lambda x, stored: x.to(stored.dtype), obs, self._obs)
        keys = fingerprints(obs)
        slots = [self._slots.get(key, -1) for key in keys]
        unknown = [i for i, slot in enumerate(slots) if slot < 0]
        if len(unknown) == len(keys):
            sums = self.policy.logit_sums(obs)
        else:
            sums = self._sums[th.tensor(slots, device=self._sums.device)]
            if unknown:
                sums[unknown] = self.policy.logit_sums(select(obs, unknown))
        if remember and unknown:
            self._remember([keys[i] for i in unknown], select(obs, unknown), sums[unknown])
        return sums

    def _remember(self, keys: list[int], obs: Any, sums: th.Tensor) -> None:
        if self._obs is None:
            self._sums = sums.new_empty(self.capacity, sums.shape[1])
            self._obs = map_fields(lambda x: x.new_empty(self.capacity, *x.shape[1:]), obs)
        row_of = dict(zip(keys, range(len(keys)), strict=True))  # each state once
        row_of = dict(list(row_of.items())[-self.capacity :])
        slots = [(self._next + i) % self.capacity for i in range(len(row_of))]
        self._next = (self._next + len(slots)) % self.capacity
        self._keys += [None] * (max(slots) + 1 - len(self._keys))
        for slot in slots:
            self._slots.pop(self._keys[slot], None)  # type: ignore[arg-type]
            self._keys[slot] = None
        index, rows = th.tensor(slots, device=sums.device), list(row_of.values())
        self._sums[index] = sums[rows]
        map_fields(lambda room, x: room.index_copy_(0, index, x[rows]), self._obs, obs)
        for key, slot in zip(row_of, slots, strict=True):
            self._keys[slot], self._slots[key] = key, slot

    def follow(self, update: PolicyUpdate, newest: CriticEnsemble, deleted: Sequence[CriticEnsemble]) -> None:
        """
        Bring the cache up to date after a policy update. If this is interrupted, everything is forgotten.

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
            obs = select(self._obs, rows)
            of_deleted = [policy.q_values(critics, obs) for critics in deleted]
            self._sums[rows] = update.apply(self._sums[rows], policy.q_values(newest, obs), of_deleted)
        self._version = policy.frozen_critics.version

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the contents as arrays, with a digest of the stack that they belong to."""
        n = len(self._keys)
        obs = self._obs if isinstance(self._obs, dict) else {"": self._obs}
        if n == 0 or None in self._keys or self._version != self.policy.frozen_critics.version:
            return {}
        return {
            **{f"obs:{name}": x[:n].cpu().numpy() for name, x in obs.items()},
            "sums": self._sums[:n].cpu().numpy(),
            "next": np.array(self._next),
            "stack": np.frombuffer(stack_digest(self.policy), dtype=np.uint8),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore what :meth:`state_dict` returned, if it belongs to the policy's stack."""
        self.clear()
        matches = state and state["stack"].tobytes() == stack_digest(self.policy)
        if not matches or len(state["sums"]) > self.capacity:
            return
        to_tensor = partial(th.as_tensor, device=self.policy.device)
        fields = {name.removeprefix("obs:"): to_tensor(x) for name, x in state.items() if name.startswith("obs:")}
        obs: Any = fields.get("", fields)
        self._remember(fingerprints(obs), obs, to_tensor(state["sums"]))
        self._next, self._version = int(state["next"]), self.policy.frozen_critics.version


def stack_digest(policy: StaQPolicy) -> bytes:
    """Hash the stack of a policy: 32 bytes."""
    digest = hashlib.sha256()
    for tensor in policy.frozen_critics.state_dict().values():
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.digest()


def cache_fits(buffer: ReplayBuffer, n_bins: int) -> bool:
    """
    Return whether ``logit_cache="auto"`` may take the memory that the cache needs.

    It may take ``CACHE_BYTES`` more than half of the replay buffer.
    """
    arrays = buffer.observations if isinstance(buffer.observations, dict) else {"": buffer.observations}
    observations = sum(array.nbytes for array in arrays.values())
    stored = observations if buffer.optimize_memory_usage else 2 * observations
    needed = observations + buffer.buffer_size * buffer.n_envs * (4 * n_bins + BYTES_PER_KEY)
    return needed <= CACHE_BYTES + stored // 2
