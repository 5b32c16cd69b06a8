"""
The training of one cell, in a process of its own, through RL Zoo3's ``ExperimentManager``.

A checkpoint holds all that the training needs to go on, *and* the evaluations so far; the result file is written from
it right after it. So whatever the result file says is never done again, at whatever moment the process is killed.
Continuing is not bitwise the same as not having stopped: the state of the environments is not kept, they start new
episodes with new seeds, and an unfinished rollout is collected again.
"""

import os
import pickle
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from filelock import FileLock
from rl_zoo3.exp_manager import ExperimentManager
from sb3_contrib.common.utils import quantile_huber_loss
from sb3_contrib.qrdqn import qrdqn
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

import sb3_staq
from benchmarks.results import Evaluation, Results
from benchmarks.suites import Cell

# Far from the seeds of the trainings; episode i of every evaluation has the seed EVAL_SEED + i
EVAL_SEED = 1_000_000
FINAL_EVAL_SEED = 2_000_000
N_FINAL_EPISODES = 20
PACKAGES = ("stable-baselines3", "sb3-contrib", "rl-zoo3", "gymnasium", "torch", "numpy", "mujoco", "MinAtar")

# Called with (step, seconds of training, mean return of the last evaluation if any)
Report = Callable[[int, float, float | None], None]


@dataclass
class Progress:
    """
    What a checkpoint keeps beside the model.

    :param seconds: wall-clock seconds of training
    :param cpu_seconds: the processor's seconds of training
    :param evaluations: evaluations so far
    :param rng: states of the random number generators of Python, NumPy and PyTorch
    :param settings: of the cell
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    evaluations: list[Evaluation] = field(default_factory=list)
    rng: tuple[Any, Any, th.Tensor] | None = None
    settings: dict[str, Any] | None = None

    def evaluation(self, step: int, returns: list[float], final: bool = False) -> Evaluation:
        """
        :param step: environment steps of training so far
        :param returns: return of each episode
        :param final: whether it is the long evaluation after the training
        :return: an evaluation at the present time of training
        """
        return Evaluation(step, self.seconds, self.cpu_seconds, returns, final)

    def remember_rng(self) -> None:
        """Keep the states of the generators."""
        self.rng = (random.getstate(), np.random.get_state(), th.get_rng_state())

    def restore_rng(self) -> None:
        """Put the generators back into the states that were kept."""
        assert self.rng is not None
        random.setstate(self.rng[0])
        np.random.set_state(self.rng[1])
        th.set_rng_state(self.rng[2])


class Checkpoints:
    """
    The checkpoints of a cell: one folder each, complete as soon as it has its name. Only the newest is kept.

    :param cell: the cell
    """

    def __init__(self, cell: Cell):
        self.folder = cell.working_folder / "checkpoints"

    def newest(self) -> Path | None:
        """
        :return: the newest checkpoint if there is any
        """
        return max(self.folder.glob("step_*"), default=None, key=lambda path: int(path.name.removeprefix("step_")))

    def save(self, manager: ExperimentManager, model: BaseAlgorithm, progress: Progress) -> None:
        """
        :param manager: gives the names of the files, which are those that it looks for when it continues a training
        :param model: model to save, with replay buffer and normalisation if it has them
        :param progress: what else to save
        """
        unfinished = self.folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        model.save(unfinished / "model.zip")
        if hasattr(model, "save_replay_buffer"):
            model.save_replay_buffer(unfinished / "replay_buffer.pkl")
        vec_normalize = model.get_vec_normalize_env()
        if vec_normalize is not None:
            (unfinished / manager.env_name).mkdir()
            vec_normalize.save(str(unfinished / manager.env_name / "vecnormalize.pkl"))
        progress.remember_rng()
        (unfinished / "progress.pkl").write_bytes(pickle.dumps(progress))

        complete = self.folder / f"step_{model.num_timesteps}"
        shutil.rmtree(complete, ignore_errors=True)
        unfinished.rename(complete)
        for path in self.folder.glob("step_*"):
            if path != complete:
                shutil.rmtree(path)


class Recorder(BaseCallback):
    """
    Evaluates the policy every ``eval_freq`` steps, and saves a checkpoint as soon as the training is between two
    rollouts, where nothing is half done. The clock of the training is stopped meanwhile.

    :param manager: manager of the training
    :param cell: the cell
    :param results: what there is so far
    :param progress: where the training stands
    :param report: gets to know the progress a few times per second
    """

    def __init__(self, manager: ExperimentManager, cell: Cell, results: Results, progress: Progress, report: Report):
        super().__init__()
        self.manager = manager
        self.cell = cell
        self.results = results
        self.progress = progress
        self.report = report
        self.checkpoints = Checkpoints(cell)
        self.eval_env = manager.create_envs(cell.n_eval_episodes, eval_env=True)
        self._clock_start: tuple[float, float] | None = None  # wall clock and processor
        self._last_report = 0.0
        self._saved_evaluations = len(progress.evaluations)
        self._next_evaluation = 0

    def _start_clock(self) -> None:
        self._clock_start = (time.perf_counter(), time.process_time())

    def _read_clock(self) -> None:
        """Add the time since the last reading to the progress."""
        if self._clock_start is not None:
            wall, cpu = self._clock_start
            self._start_clock()
            self.progress.seconds += self._clock_start[0] - wall
            self.progress.cpu_seconds += self._clock_start[1] - cpu

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What is done meanwhile does not count as training."""
        self._read_clock()
        self._clock_start = None
        yield
        self._start_clock()

    def _on_training_start(self) -> None:
        self._schedule_evaluation()
        self._start_clock()

    def _schedule_evaluation(self) -> None:
        freq = self.cell.eval_freq
        self._next_evaluation = (self.model.num_timesteps // freq + 1) * freq

    def _on_step(self) -> bool:
        if self.num_timesteps >= self._next_evaluation:
            with self.clock_stopped():
                returns = evaluate(self.model, self.eval_env, EVAL_SEED)
                self.progress.evaluations.append(self.progress.evaluation(self.num_timesteps, returns))
                self._schedule_evaluation()
        if time.perf_counter() - self._last_report > 0.5:
            self.send_report()
        # Others end by themselves; long rollouts would go on far beyond the budget (complete ones are learnt from)
        model, done = self.model, self.num_timesteps >= self.cell.steps
        return not (done and isinstance(model, OnPolicyAlgorithm) and model.rollout_buffer.pos + 1 < model.n_steps)

    def _on_rollout_start(self) -> None:
        if len(self.progress.evaluations) > self._saved_evaluations:
            self.save()

    def _on_training_end(self) -> None:
        self.save()

    def save(self) -> None:
        """Checkpoint first, results second."""
        with self.clock_stopped():
            self.checkpoints.save(self.manager, self.model, self.progress)
            self.results.evaluations = list(self.progress.evaluations)
            self.results.write(self.cell.results_file)
            self._saved_evaluations = len(self.progress.evaluations)
            self.send_report()

    def send_report(self) -> None:
        """Tell how far the training is."""
        self._read_clock()
        evaluations = self.progress.evaluations
        self.report(self.model.num_timesteps, self.progress.seconds, evaluations[-1].mean if evaluations else None)
        self._last_report = time.perf_counter()


def truncate_last_episodes(model: BaseAlgorithm) -> None:
    """
    The environments begin new episodes: in the replay buffer, mark the last transitions of the old ones as timeouts, so
    that n-step returns do not run from one into the other.

    :param model: a model that has just been loaded
    """
    buffer = getattr(model, "replay_buffer", None)
    if buffer is not None and buffer.size() > 0 and buffer.handle_timeout_termination:
        last = (buffer.pos - 1) % buffer.buffer_size
        buffer.timeouts[last] = buffer.timeouts[last] + (1 - buffer.dones[last])
        buffer.dones[last] = 1


def evaluate(model: BaseAlgorithm, env: VecEnv, seed: int) -> list[float]:
    """
    One greedy episode in each environment.

    :param model: the model
    :param env: environments, wrapped as those of the training
    :param seed: seed of the first environment; the others have those that follow
    :return: returns of the episodes
    """
    training_env = model.get_env()
    if training_env is not None and model.get_vec_normalize_env() is not None:
        sync_envs_normalization(training_env, env)
    env.seed(seed)
    returns, _ = evaluate_policy(model, env, env.num_envs, deterministic=True, return_episode_rewards=True)
    return np.asarray(returns, dtype=float).tolist()


def fuse_quantile_loss() -> None:
    """
    Let QR-DQN train with its own loss compiled, the same up to rounding. The loss compares each pair of quantiles, with
    the zoo's settings of LunarLander 170 x 170 for each transition, and takes six sevenths of the training if each of
    its operations passes over all pairs. Where there is no C++ compiler it does so (with a warning by PyTorch).
    """
    th._dynamo.config.suppress_errors = True
    qrdqn.quantile_huber_loss = th.compile(quantile_huber_loss)


def make_metadata(cell: Cell, settings: dict[str, Any], n_envs: int) -> dict[str, Any]:
    """
    :param cell: the cell
    :param settings: of the cell
    :param n_envs: number of environments of the training
    :return: what the header of its result file says
    """
    versions = {"python": platform.python_version(), "sb3-staq": sb3_staq.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ImportError:
            continue
    return {
        "suite": cell.suite,
        "env": cell.env_id,
        "algo": cell.algo,
        "seed": cell.seed,
        **settings,
        "n_final_episodes": N_FINAL_EPISODES,
        "n_envs": n_envs,
        "versions": versions,
        "machine": {"cores": os.cpu_count(), "threads_per_run": 1, "processor": platform.machine()},
    }


def run_cell(cell: Cell, report: Report) -> None:
    """
    Train from the last checkpoint, or from scratch, to the end.

    :param cell: the cell
    :param report: gets to know the progress a few times per second
    """
    th.set_num_threads(1)
    cell.working_folder.mkdir(parents=True, exist_ok=True)
    with FileLock(cell.working_folder / "lock", timeout=30):
        checkpoint, settings = Checkpoints(cell).newest(), cell.settings()
        progress = Progress(settings=settings)
        if checkpoint:
            saved = pickle.loads((checkpoint / "progress.pkl").read_bytes())
            if saved.settings in (settings, None):  # None: an older checkpoint
                progress = saved
            else:  # left behind by results of other settings that were deleted
                shutil.rmtree(checkpoint.parent)
                checkpoint = None
        if cell.zoo_algo == "qrdqn":
            fuse_quantile_loss()
        manager = cell.manager(str(checkpoint / "model.zip") if checkpoint else "")
        model, _ = manager.setup_experiment()
        if checkpoint:
            # New seeds: with those of the start, the environments would repeat their first episodes
            model.set_random_seed(cell.seed + model.num_timesteps)
            progress.restore_rng()
            truncate_last_episodes(model)
        results = Results(make_metadata(cell, settings, manager.n_envs), list(progress.evaluations))
        results.write(cell.results_file)

        recorder = Recorder(manager, cell, results, progress, report)
        if model.num_timesteps < cell.steps:
            # Not ``manager.learn``, which would count the steps from 0 again
            remaining, is_new = cell.steps - model.num_timesteps, checkpoint is None
            model.learn(remaining, callback=recorder, log_interval=None, reset_num_timesteps=is_new)

        returns = evaluate(model, manager.create_envs(N_FINAL_EPISODES, eval_env=True), FINAL_EVAL_SEED)
        results.evaluations.append(progress.evaluation(model.num_timesteps, returns, final=True))
        results.write(cell.results_file)
        report(model.num_timesteps, progress.seconds, results.evaluations[-1].mean)
        newest = Checkpoints(cell).newest()
        assert newest is not None
        (newest / "replay_buffer.pkl").unlink(missing_ok=True)  # large, and not needed any more
