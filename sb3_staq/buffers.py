"""The logit cache: the weighted sums of the frozen critics at every stored next state, kept up to date for two passes.

Direct evaluation costs a pass through all M frozen critics for every sampled next state. But the policy is fixed
between policy updates, and an update changes the sum only by the newest and the deleted critic (see
:mod:`sb3_staq.mirror_descent`), so the sums are stored beside the transitions and brought up to date once per update.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import PyTorchObs, ReplayBufferSamples

from sb3_staq.critics import FrozenCritics
from sb3_staq.mirror_descent import PolicyUpdate

# Stored states per batch when the whole cache is updated: large enough for full speed, small enough for any memory
_UPDATE_BATCH_SIZE = 4096


def split_samples(samples: ReplayBufferSamples, batch_size: int) -> Iterator[ReplayBufferSamples]:
    """
    :param samples: what a replay buffer's ``sample`` returned
    :param batch_size: number of transitions per part
    :return: its parts, views of it
    """

    def part(field: Any, rows: slice) -> Any:
        if isinstance(field, dict):
            return {key: values[rows] for key, values in field.items()}
        return None if field is None else field[rows]

    for start in range(0, len(samples.rewards), batch_size):
        rows = slice(start, start + batch_size)
        yield type(samples)(*(part(field, rows) for field in samples))


class _RecordedArray:
    """Stands in for the array of next observations during a sample and remembers which elements were taken."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.index: tuple[np.ndarray, np.ndarray] | None = None

    def __getitem__(self, index: tuple) -> np.ndarray:
        if self.index is None:
            self.index = index[:2]
        return self.array[index]


class LogitCache:
    """
    The weighted sums ``S(s')`` at a replay buffer's next states.

    The buffer stays SB3's own: the cache watches which elements a sample takes and keeps its values beside them.

    :param replay_buffer: a plain, Dict or n-step replay buffer, see :meth:`supports`
    :param frozen_critics: the stack that is summed
    :param device: where the sums are kept
    """

    def __init__(self, replay_buffer: ReplayBuffer, frozen_critics: FrozenCritics, device: th.device):
        self.replay_buffer = replay_buffer
        self.frozen_critics = frozen_critics
        n_choices = frozen_critics.n_choices
        self.sums = th.zeros(replay_buffer.buffer_size, replay_buffer.n_envs, n_choices, device=device)
        self._synced = self._fingerprint() if replay_buffer.size() == 0 else None
        # With `optimize_memory_usage`, next observations stand in `observations`, one row further
        self._array_name = "observations" if replay_buffer.optimize_memory_usage else "next_observations"

    @staticmethod
    def supports(replay_buffer: ReplayBuffer) -> bool:
        """
        Whether the next states that the buffer will hand out are known beforehand. Exact classes: a subclass may
        relabel its transitions (HER) or store them otherwise.
        """
        return type(replay_buffer) in (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)

    def _fingerprint(self) -> tuple[Any, ...]:
        """
        Tells whether somebody else has written to the buffer (where it writes next and what it wrote last) or changed
        the stack.
        """
        buffer = self.replay_buffer
        last = (buffer.pos - 1) % buffer.buffer_size
        observations = buffer.observations
        if isinstance(observations, dict):
            observations = next(iter(observations.values()))
        written = buffer.pos, buffer.full, buffer.actions[last].tobytes(), observations[last].tobytes()
        return *written, self.frozen_critics.n_changes

    @property
    def in_sync(self) -> bool:
        """Whether the sums are those of the current stack at what is stored now."""
        return self._synced == self._fingerprint()

    def sync(self, logit_sums: Callable[[PyTorchObs], th.Tensor]) -> None:
        """
        Make sure that all transitions in the buffer have their sums: after loading a buffer or a stack, changing one
        by hand or an interrupted update, the whole stack is evaluated at all stored next states.

        :param logit_sums: the weighted sums at observations
        """
        if not self.in_sync:
            for obs, sums in self._batches():
                sums.copy_(logit_sums(obs))
            self._synced = self._fingerprint()

    def append(self, logit_sums: Callable[[PyTorchObs], th.Tensor]) -> th.Tensor:
        """
        Evaluate the sums at the next states of the transitions that the buffer's last ``add`` stored.

        :param logit_sums: the weighted sums at observations
        :return: shape (n_envs, n_choices)
        """
        buffer = self.replay_buffer
        row = buffer.pos if buffer.optimize_memory_usage else (buffer.pos - 1) % buffer.buffer_size
        sums = logit_sums(self._next_observations(slice(row, row + 1)))
        self.sums[row] = sums
        self._synced = self._fingerprint()
        return sums

    def sample(self, batch_size: int) -> tuple[ReplayBufferSamples, th.Tensor]:
        """
        :param batch_size: number of transitions
        :return: what the buffer's ``sample`` returns, and the index of its next states, see :meth:`sums_at`
        """
        arrays = getattr(self.replay_buffer, self._array_name)
        if isinstance(arrays, dict):
            key = next(iter(arrays))
            recorded = _RecordedArray(arrays[key])
            stand_in: Any = {**arrays, key: recorded}
        else:
            recorded = stand_in = _RecordedArray(arrays)
        setattr(self.replay_buffer, self._array_name, stand_in)
        try:
            samples = self.replay_buffer.sample(batch_size)
        finally:
            setattr(self.replay_buffer, self._array_name, arrays)
        assert recorded.index is not None
        rows, envs = recorded.index
        index = th.as_tensor(rows * self.replay_buffer.n_envs + envs)
        return samples, index.to(self.sums.device, non_blocking=True)

    def sums_at(self, index: th.Tensor) -> th.Tensor:
        """
        :param index: of next states, from :meth:`sample`, shape (batch_size,)
        :return: the weighted sums there, shape (batch_size, n_choices)
        """
        return self.sums.flatten(0, 1)[index]

    def update(
        self,
        update: PolicyUpdate,
        newest: Callable[[PyTorchObs], th.Tensor],
        deleted: Callable[[PyTorchObs], th.Tensor] | None,
    ) -> None:
        """
        Follow a policy update at all stored next states. The sums are in sync with the changed stack at the end only:
        after an interruption it is evaluated at all of them.

        :param update: what the update does to the weighted sums
        :param newest: Q-values of the pushed critics at observations
        :param deleted: Q-values of the deleted critics at observations, None if none were
        """
        for obs, sums in self._batches():
            sums.copy_(update.apply(sums, newest(obs), deleted(obs) if deleted is not None else None))
        self._synced = self._fingerprint()

    def _batches(self) -> Iterator[tuple[PyTorchObs, th.Tensor]]:
        """All stored next observations and the views of their sums, in large batches."""
        buffer = self.replay_buffer
        n_rows = buffer.size()
        if buffer.optimize_memory_usage:
            n_rows = min(n_rows + 1, buffer.buffer_size)
        rows_per_batch = max(1, _UPDATE_BATCH_SIZE // buffer.n_envs)
        for start in range(0, n_rows, rows_per_batch):
            rows = slice(start, min(start + rows_per_batch, n_rows))
            yield self._next_observations(rows), self.sums[rows].flatten(0, 1)

    def _next_observations(self, rows: slice) -> PyTorchObs:
        """Next observations of these rows of the buffer, environments flattened into the batch."""

        def to_torch(array: np.ndarray) -> th.Tensor:
            return self.replay_buffer.to_torch(array[rows].reshape(-1, *array.shape[2:]), copy=False)

        arrays = getattr(self.replay_buffer, self._array_name)
        return {key: to_torch(array) for key, array in arrays.items()} if isinstance(arrays, dict) else to_torch(arrays)
