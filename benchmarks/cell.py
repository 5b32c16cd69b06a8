"""
The training of one cell, in a process of its own, through RL Zoo3's ``ExperimentManager``.

A checkpoint holds the evaluations so far, and the result file is written from it right after it. So whatever the
result file says is never done again, at whatever moment the process is killed.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
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
from benchmarks.checkpoints import Checkpoints, Progress
from benchmarks.results import Evaluation, Results
from benchmarks.suites import Cell

# Far from the seeds of the trainings; episode i of every evaluation has the seed EVAL_SEED + i
EVAL_SEED = 1_000_000
FINAL_EVAL_SEED = 2_000_000
N_FINAL_EPISODES = 20
PACKAGES = ("stable-baselines3", "sb3-contrib", "rl-zoo3", "gymnasium", "torch", "numpy", "mujoco", "MinAtar")

# Called with (step, seconds of training, mean return of the last evaluation if any)
Report = Callable[[int, float, float | None], None]


class Recorder(BaseCallback):
    """
    Evaluates the policy every ``eval_freq`` steps, and saves a checkpoint as soon as the training is between two
    rollouts, where nothing is half done. The clock of the training is stopped meanwhile.
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
        self._clock: tuple[float, float] | None = None  # wall clock and processor at the last reading
        self._last_report = 0.0
        self._next_evaluation = 0

    def _read_clock(self) -> None:
        """Add the time since the last reading to the progress."""
        now = (time.perf_counter(), time.process_time())
        if self._clock is not None:
            self.progress.seconds += now[0] - self._clock[0]
            self.progress.cpu_seconds += now[1] - self._clock[1]
        self._clock = now

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What is done meanwhile does not count as training."""
        self._read_clock()
        self._clock = None
        yield
        self._read_clock()

    def _on_training_start(self) -> None:
        self._schedule_evaluation()
        self._read_clock()

    def _schedule_evaluation(self) -> None:
        freq = self.cell.eval_freq
        self._next_evaluation = (self.model.num_timesteps // freq + 1) * freq

    def _on_step(self) -> bool:
        if self.num_timesteps >= self._next_evaluation:
            with self.clock_stopped():
                returns = evaluate(self.model, self.eval_env, EVAL_SEED)
                times = self.progress.seconds, self.progress.cpu_seconds
                self.progress.evaluations.append(Evaluation(self.num_timesteps, *times, returns))
                self._schedule_evaluation()
        if time.perf_counter() - self._last_report > 0.5:
            self.send_report()
        # Others end by themselves; long rollouts would go on far beyond the budget (complete ones are learnt from)
        model, done = self.model, self.num_timesteps >= self.cell.steps
        return not (done and isinstance(model, OnPolicyAlgorithm) and model.rollout_buffer.pos + 1 < model.n_steps)

    def _on_rollout_start(self) -> None:
        if len(self.progress.evaluations) > len(self.results.evaluations):
            self.save()

    def _on_training_end(self) -> None:
        self.save()

    def save(self) -> None:
        """Checkpoint first, results second."""
        with self.clock_stopped():
            self.checkpoints.save(self.manager, self.model, self.progress)
            self.results.evaluations = list(self.progress.evaluations)
            self.results.write(self.cell.results_file)
            self.send_report()

    def send_report(self) -> None:
        """Tell how far the training is."""
        if self._clock is not None:
            self._read_clock()
        evaluations = self.progress.evaluations
        self.report(self.model.num_timesteps, self.progress.seconds, evaluations[-1].mean if evaluations else None)
        self._last_report = time.perf_counter()


def evaluate(model: BaseAlgorithm, env: VecEnv, seed: int) -> list[float]:
    """Returns of one greedy episode in each environment; the first one has this seed, the others those that follow."""
    training_env = model.get_env()
    if training_env is not None and model.get_vec_normalize_env() is not None:
        sync_envs_normalization(training_env, env)
    env.seed(seed)
    returns, _ = evaluate_policy(model, env, env.num_envs, deterministic=True, return_episode_rewards=True)
    return np.asarray(returns, dtype=float).tolist()


def fuse_quantile_loss() -> None:
    """
    Let QR-DQN train with its own loss compiled, the same up to rounding.

    The loss compares each pair of quantiles, with the zoo's settings of LunarLander 170 x 170 for each transition, and
    takes six sevenths of the training if each of its operations passes over all pairs. Where there is no C++ compiler
    it does so (with a warning by PyTorch).
    """
    th._dynamo.config.suppress_errors = True
    qrdqn.quantile_huber_loss = th.compile(quantile_huber_loss)


def make_metadata(cell: Cell, settings: dict[str, Any], n_envs: int) -> dict[str, Any]:
    """What the header of a result file says."""
    versions = {"python": platform.python_version(), "sb3-staq": sb3_staq.__version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
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
    """Train from the last checkpoint, or from scratch, to the end; tell the progress a few times per second."""
    th.set_num_threads(1)
    cell.working_folder.mkdir(parents=True, exist_ok=True)
    with FileLock(cell.working_folder / "lock", timeout=30):
        checkpoints, settings = Checkpoints(cell), cell.settings()
        progress = checkpoints.progress(settings)
        checkpoint = checkpoints.newest()
        if cell.zoo_algo == "qrdqn":
            fuse_quantile_loss()
        manager = cell.manager(str(checkpoint / "model.zip") if checkpoint else "")
        model, _ = manager.setup_experiment()
        if checkpoint:
            checkpoints.restore(model, progress)
        results = Results(make_metadata(cell, settings, manager.n_envs), list(progress.evaluations))
        results.write(cell.results_file)

        recorder = Recorder(manager, cell, results, progress, report)
        if model.num_timesteps < cell.steps:
            # Not ``manager.learn``, which would count the steps from 0 again
            remaining, is_new = cell.steps - model.num_timesteps, checkpoint is None
            model.learn(remaining, callback=recorder, log_interval=None, reset_num_timesteps=is_new)

        returns = evaluate(model, manager.create_envs(N_FINAL_EPISODES, eval_env=True), FINAL_EVAL_SEED)
        times = progress.seconds, progress.cpu_seconds
        results.evaluations.append(Evaluation(model.num_timesteps, *times, returns, final=True))
        results.write(cell.results_file)
        report(model.num_timesteps, progress.seconds, results.evaluations[-1].mean)
        checkpoints.drop_replay()
