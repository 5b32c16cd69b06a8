"""
The training of one cell, in its own process, with RL Zoo3's ``ExperimentManager``.

It can be killed at any time: the next run continues from the last checkpoint, bitwise as if nothing had happened if the
environments provide their states, see ``sb3_staq.resume``.
"""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from filelock import FileLock
from sb3_contrib.common.utils import quantile_huber_loss
from sb3_contrib.qrdqn import qrdqn
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

import sb3_staq
from benchmarks.results import Evaluation, Results, commit
from benchmarks.suites import Cell
from sb3_staq.resume import ResumeCallback

# Far from the seeds of the trainings; episode i of every evaluation has the seed EVAL_SEED + i
EVAL_SEED = 1_000_000
FINAL_EVAL_SEED = 2_000_000
N_FINAL_EPISODES = 20
PACKAGES = ("stable-baselines3", "sb3-contrib", "rl-zoo3", "gymnasium", "torch", "numpy", "mujoco", "MinAtar")

# Steps between two checkpoints, some minutes of a slow training; there are at least ten in a training
SAVE_FREQ = 25_000

# Called with (step, seconds of training, mean return of the last evaluation if any)
Report = Callable[[int, float, float | None], None]


class Recorder(CallbackList):
    """
    Evaluate the policy every ``eval_freq`` steps, and save checkpoints.

    The checkpoints include its own attributes. The training clock is stopped meanwhile.
    """

    def __init__(self, cell: Cell, results: Results, eval_env: VecEnv, checkpoints: Path, report: Report):
        super().__init__([ResumeCallback(min(SAVE_FREQ, -(-cell.steps // 10)), checkpoints)])
        self.cell = cell
        self.results = results
        self.eval_env = eval_env
        self.report = lambda *progress: report(*progress)  # cannot be pickled, so it is not restored
        self.times = np.zeros(2)  # seconds of training so far: wall-clock and CPU time
        self._clock: np.ndarray | None = None  # last reading of both
        self._last_report = 0.0
        self._next_evaluation = cell.eval_freq

    def _read_clock(self) -> None:
        """Add the time since the last reading."""
        now = np.array([time.perf_counter(), time.process_time()])
        if self._clock is not None:
            self.times += now - self._clock
        self._clock = now

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """Stop the clock: what is done meanwhile does not count as training."""
        self._read_clock()
        self._clock = None
        yield
        self._read_clock()

    def record(self, returns: list[float], final: bool = False) -> None:
        """Record the returns of an evaluation, and write all results."""
        step, commits = self.model.num_timesteps, self.results.metadata["commits"]
        if (current := commit()) and current not in commits[-1:]:
            commits.append(current)
        self.results.evaluations.append(Evaluation(step, float(self.times[0]), float(self.times[1]), returns, final))
        self.results.write(self.cell.results_file)
        self.send_report()

    def send_report(self) -> None:
        """Report how far the training has come."""
        evaluations = self.results.evaluations
        self.report(self.model.num_timesteps, float(self.times[0]), evaluations[-1].mean if evaluations else None)
        self._last_report = time.perf_counter()

    def _on_training_start(self) -> None:
        super()._on_training_start()  # goes on from a checkpoint
        self._last_report, self._clock = 0.0, None
        self._read_clock()

    def _on_rollout_start(self) -> None:
        with self._clock_stopped():
            super()._on_rollout_start()

    def _on_step(self) -> bool:
        super()._on_step()
        if self.num_timesteps >= self._next_evaluation:
            with self._clock_stopped():
                self._next_evaluation = (self.num_timesteps // self.cell.eval_freq + 1) * self.cell.eval_freq
                self.record(evaluate(self.model, self.eval_env, EVAL_SEED))
        if not 0 <= time.perf_counter() - self._last_report <= 0.5:  # less than 0 after a restart of the machine
            self._read_clock()
            self.send_report()
        # Others end by themselves; long rollouts would far exceed the budget (complete ones are learnt from)
        model, done = self.model, self.num_timesteps >= self.cell.steps
        return not (done and isinstance(model, OnPolicyAlgorithm) and model.rollout_buffer.pos + 1 < model.n_steps)

    def _on_training_end(self) -> None:
        with self._clock_stopped():
            super()._on_training_end()


def evaluate(model: BaseAlgorithm, env: VecEnv, seed: int) -> list[float]:
    """Return the returns of one greedy episode per environment; the first has this seed, the others the next ones."""
    training_env = model.get_env()
    if training_env is not None and model.get_vec_normalize_env() is not None:
        sync_envs_normalization(training_env, env)
    env.seed(seed)
    returns, _ = evaluate_policy(model, env, env.num_envs, deterministic=True, return_episode_rewards=True)
    return np.asarray(returns, dtype=float).tolist()


def fuse_quantile_loss() -> None:
    """
    Let QR-DQN train with its own loss compiled, which is the same up to rounding.

    The loss compares each pair of quantiles: with the zoo's settings for LunarLander, 170 x 170 per transition. It
    takes six sevenths of the training time if each of its operations passes over all pairs, as it does without a C++
    compiler (with a warning by PyTorch).
    """
    th._dynamo.config.suppress_errors = True
    qrdqn.quantile_huber_loss = th.compile(quantile_huber_loss)


def make_metadata(cell: Cell, settings: dict[str, Any], n_envs: int) -> dict[str, Any]:
    """Return what the header of a result file says."""
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
        "commits": [],  # of the code, more than one if the training was resumed with another
        "machine": {"cores": os.cpu_count(), "threads_per_run": 1, "processor": platform.machine()},
    }


def run_cell(cell: Cell, report: Report) -> None:
    """Train from the last checkpoint, or from scratch, to the end; report the progress a few times per second."""
    th.set_num_threads(1)
    cell.working_folder.mkdir(parents=True, exist_ok=True)
    with FileLock(cell.working_folder / "lock", timeout=30):
        if cell.results_file.exists() and Results.read(cell.results_file).done:
            return  # another process has trained it meanwhile
        settings = cell.settings()
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        checkpoints = cell.working_folder / f"checkpoints_{digest}"
        for path in cell.working_folder.glob("checkpoints*"):
            if path != checkpoints:  # of other settings, whose results were deleted
                shutil.rmtree(path)
        if cell.zoo_algo == "qrdqn":
            fuse_quantile_loss()
        manager = cell.manager()
        model, _ = manager.setup_experiment()
        eval_env = manager.create_envs(cell.n_eval_episodes, eval_env=True)
        results = Results(make_metadata(cell, settings, manager.n_envs))
        recorder = Recorder(cell, results, eval_env, checkpoints, report)
        model.learn(cell.steps, callback=recorder, log_interval=None)
        manager.save_trained_model(model)
        final_env = manager.create_envs(N_FINAL_EPISODES, eval_env=True)
        recorder.record(evaluate(model, final_env, FINAL_EVAL_SEED), final=True)
        shutil.rmtree(checkpoints)
