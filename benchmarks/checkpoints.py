"""
Checkpoints of a cell: all that its training needs to go on, and the evaluations so far.

Continuing is not bitwise the same as not having stopped: the state of the environments is not kept, they start new
episodes with new seeds, and an unfinished rollout is collected again.
"""

import pickle
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm

from benchmarks.results import Evaluation
from benchmarks.suites import Cell


@dataclass
class Progress:
    """What a checkpoint keeps beside the model."""

    seconds: float = 0.0  # of training by the wall clock
    cpu_seconds: float = 0.0  # of training by the processor's
    evaluations: list[Evaluation] = field(default_factory=list)
    rng: tuple[Any, Any, th.Tensor] | None = None  # states of the generators of Python, NumPy and PyTorch
    settings: dict[str, Any] | None = None  # of the cell


class Checkpoints:
    """The checkpoints of a cell: one folder each, complete as soon as it has its name. Only the newest is kept."""

    def __init__(self, cell: Cell):
        self.seed = cell.seed
        self.folder = cell.working_folder / "checkpoints"

    def newest(self) -> Path | None:
        """The newest checkpoint if there is any."""
        return max(self.folder.glob("step_*"), default=None, key=lambda path: int(path.name.removeprefix("step_")))

    def save(self, manager: ExperimentManager, model: BaseAlgorithm, progress: Progress) -> None:
        """Save a training, under the names that the manager looks for when it continues one."""
        unfinished, complete = self.folder / "unfinished", self.folder / f"step_{model.num_timesteps}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        model.save(unfinished / "model.zip")
        if hasattr(model, "save_replay_buffer"):
            model.save_replay_buffer(unfinished / "replay_buffer.pkl")
        vec_normalize = model.get_vec_normalize_env()
        if vec_normalize is not None:
            (unfinished / manager.env_name).mkdir()
            vec_normalize.save(str(unfinished / manager.env_name / "vecnormalize.pkl"))
        progress.rng = (random.getstate(), np.random.get_state(), th.get_rng_state())
        (unfinished / "progress.pkl").write_bytes(pickle.dumps(progress))

        shutil.rmtree(complete, ignore_errors=True)
        unfinished.rename(complete)
        for path in self.folder.glob("step_*"):
            if path != complete:
                shutil.rmtree(path)

    def progress(self, settings: dict[str, Any]) -> Progress:
        """Where the training stands: at the newest checkpoint if it is one of these settings, else at the start."""
        newest = self.newest()
        if newest is not None:
            progress: Progress = pickle.loads((newest / "progress.pkl").read_bytes())
            if progress.settings in (settings, None):  # None: an older checkpoint
                return progress
            shutil.rmtree(self.folder)  # left behind by results of other settings that were deleted
        return Progress(settings=settings)

    def restore(self, model: BaseAlgorithm, progress: Progress) -> None:
        """Prepare a model that has just been loaded for going on in environments that begin new episodes."""
        # New seeds: with those of the start, the environments would repeat their first episodes
        model.set_random_seed(self.seed + model.num_timesteps)
        assert progress.rng is not None
        random.setstate(progress.rng[0])
        np.random.set_state(progress.rng[1])
        th.set_rng_state(progress.rng[2])
        # The last transitions of the old episodes count as timeouts, so that n-step returns end there
        buffer = getattr(model, "replay_buffer", None)
        if buffer is not None and buffer.size() > 0 and buffer.handle_timeout_termination:
            last = (buffer.pos - 1) % buffer.buffer_size
            buffer.timeouts[last] = buffer.timeouts[last] + (1 - buffer.dones[last])
            buffer.dones[last] = 1

    def drop_replay(self) -> None:
        """Delete the replay buffer of a training that is complete: it is large."""
        for path in self.folder.glob("step_*/replay_buffer.pkl"):
            path.unlink()
