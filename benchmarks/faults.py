"""
Faults injected into real trainings, and what was lost: ``python -m benchmarks.faults --folder FOLDER``.

A training with a ``ResumeCallback`` meets a fault at a random moment, and the same script is restarted without the
fault. The training counts as lost if the restarted one does not end bitwise like a training without a fault
(parameters, stack, optimizer, replay buffer, statistics, returns of all episodes; one thread of a CPU), or if the model
that survived in memory, or what had been saved before, cannot be loaded and trained further. Needs Linux or macOS.
"""

import argparse
import copy
import hashlib
import multiprocessing as mp
import os
import random
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from benchmarks.results import commit
from sb3_staq import StaQ
from sb3_staq.env_state import TrainingState, get_attributes, set_attributes
from sb3_staq.q_stack import FrozenCritics
from sb3_staq.resume import ResumeCallback

N_STEPS, SAVE_FREQ = 400, 10


class BitFlipping(BitFlippingEnv):
    """An environment that provides its own state."""

    get_training_state, set_training_state = get_attributes, set_attributes


def subproc_env() -> SubprocVecEnv:
    """Make two environments in processes of their own."""
    # Not started by "fork": such a worker holds the others' pipes open, so that the death of one goes unnoticed
    where: dict[str, Any] = dict(vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method="forkserver"))
    return make_vec_env("CartPole-v1", 2, seed=0, wrapper_class=TrainingState, **where)  # type: ignore[return-value]


SMALL: dict[str, Any] = dict(
    buffer_size=250, batch_size=16, learning_starts=30, policy_update_interval=10, stats_window_size=N_STEPS, seed=0
)
EVERY_STEP: dict[str, Any] = dict(train_freq=1, gradient_steps=-1, memory_size=3, learning_rate=0.01)
HER: dict[str, Any] = dict(replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(n_sampled_goal=2))
AUTO: dict[str, Any] = dict(ent_coef="auto")
SHARE: dict[str, Any] = dict(average_share=0.4)
BEST: dict[str, Any] = dict(average_share=0.5, eval_policy="best", n_steps=3)
# Environment, policy and arguments by name; Pendulum-v1 has the defaults of Box action spaces
TRAININGS: dict[str, Callable[[], tuple[Any, str, dict[str, Any]]]] = {
    "CartPole-v1": lambda: (make_vec_env("CartPole-v1", 1, seed=0), "MlpPolicy", dict(EVERY_STEP, logit_cache=True)),
    "Pendulum-v1": lambda: (make_vec_env("Pendulum-v1", 1, seed=0), "MlpPolicy", {}),
    "n-step": lambda: (make_vec_env("CartPole-v1", 2, seed=0), "MlpPolicy", EVERY_STEP | BEST),
    "HER": lambda: (make_vec_env(BitFlipping, 2, seed=0), "MultiInputPolicy", EVERY_STEP | HER),
    "VecNormalize": lambda: (VecNormalize(make_vec_env("CartPole-v1", 2, seed=0)), "MlpPolicy", EVERY_STEP | AUTO),
    "three environments": lambda: (make_vec_env("Acrobot-v1", 3, seed=0), "MlpPolicy", EVERY_STEP | SHARE),
    "SubprocVecEnv": lambda: (subproc_env(), "MlpPolicy", EVERY_STEP),
}


def make(training: str, **kwargs: Any) -> StaQ:
    """Make the model of one of ``TRAININGS``, with other arguments in place of its own."""
    env, policy, arguments = TRAININGS[training]()
    return StaQ(policy, env, device="cpu", **{**SMALL, "policy_kwargs": dict(net_arch=[8]), **arguments, **kwargs})


def digest(model: StaQ) -> str:
    """Hash every bit of parameters, stack, optimizer, replay buffer, statistics, counters and returns of episodes."""
    hashed, buffer, normalize = hashlib.sha256(), model.replay_buffer, model.get_vec_normalize_env()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            value = [value[key] for key in sorted(value, key=str)]
        if isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        else:
            hashed.update(np.asarray(value).tobytes())

    add([model.policy.state_dict(), model.policy.optimizer.state_dict()["state"]])
    add([getattr(buffer, name) for name in ("observations", "next_observations", "actions", "rewards", "dones", "pos")])
    add([model.num_timesteps, model._n_updates, model.n_policy_updates, model._episode_num])
    add([info["r"] for info in model.ep_info_buffer or ()])
    if normalize is not None:
        add([normalize.obs_rms.mean, normalize.obs_rms.var, normalize.ret_rms.var, normalize.returns])  # type: ignore
    return hashed.hexdigest()


def save(model: StaQ, folder: Path) -> None:
    """Save the model and its replay buffer."""
    model.save(folder / "saved.zip")
    model.save_replay_buffer(folder / "saved.pkl")


def load_and_train(training: str, folder: Path) -> StaQ:
    """Load what was saved and train further; return the model with the loaded parameters."""
    model = StaQ.load(folder / "saved.zip", env=TRAININGS[training]()[0])
    loaded = copy.deepcopy(model.policy.state_dict())
    model.load_replay_buffer(folder / "saved.pkl")
    model.learn(60, reset_num_timesteps=False)
    model.policy.load_state_dict(loaded)
    return model


# Faults within the process: entering injects the damage, leaving repairs it


@contextmanager
def full_disk(model: StaQ, folder: Path, rng: random.Random) -> Iterator[None]:
    """Limit files to a random size, and at once try to save over what was saved before."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(20_000), limits[1]))
    with suppress(OSError):
        save(model, folder)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def no_folder(model: StaQ, folder: Path, rng: random.Random) -> Iterator[None]:
    """Put a file in place of the folder, so that no user at all can write into it."""
    (folder / "checkpoints").rename(folder / "elsewhere")
    (folder / "checkpoints").touch()
    yield
    (folder / "checkpoints").unlink()
    (folder / "elsewhere").rename(folder / "checkpoints")


@contextmanager
def no_memory(model: StaQ, folder: Path, rng: random.Random) -> Iterator[None]:
    """Let the next policy update run out of memory for one of the tensors and modules that it makes."""
    push, left = FrozenCritics.push, [rng.randrange(1, 8)]

    def scarce(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise MemoryError
            return function(*args, **kwargs)

        return call

    def failing(*args: Any) -> Any:
        clones = mock.patch.object(th.Tensor, "clone", scarce(th.Tensor.clone))
        with clones, mock.patch.object(copy, "deepcopy", scarce(copy.deepcopy)):
            return push(*args)

    with mock.patch.object(FrozenCritics, "push", failing):
        yield


@contextmanager
def worker_dies(model: StaQ, folder: Path, rng: random.Random) -> Iterator[None]:
    """Kill one of the processes of the environments."""
    rng.choice(model.env.processes).kill()  # type: ignore[union-attr]
    yield


SIGNALS = {"SIGKILL": signal.SIGKILL, "Ctrl-C": signal.SIGINT}
INJECTED = {
    "full disk": full_disk,
    "folder that cannot be written": no_folder,
    "no memory in a policy update": no_memory,
    "worker of SubprocVecEnv dies": worker_dies,
}


class Inject(BaseCallback):
    """Inject a fault at some step of a training, which is repaired afterwards."""

    def __init__(self, fault: str, folder: Path, seed: int):
        super().__init__()
        self.inject, self.folder, self.rng, self.damage = INJECTED[fault], folder, random.Random(seed), ExitStack()
        self.at = self.rng.randrange(SAVE_FREQ + 30, N_STEPS // 4)  # calls, of up to three steps

    def _on_step(self) -> bool:
        if self.n_calls == self.at:
            save(self.model, self.folder)  # type: ignore[arg-type]
            self.damage.enter_context(self.inject(self.model, self.folder, self.rng))  # type: ignore[arg-type]
        return True


def train(training: str, folder: Path, fault: str | None = None, seed: int = 0) -> None:
    """Train to the end, or to a fault, and then check what is left in memory."""
    th.set_num_threads(1)
    warnings.simplefilter("ignore")
    inject = Inject(fault, folder, seed) if fault in INJECTED else None
    model = make(training)
    checkpoints = ResumeCallback(SAVE_FREQ, folder / "checkpoints", verbose=0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    begun = time.monotonic()
    try:
        model.learn(N_STEPS, callback=checkpoints if inject is None else [inject, checkpoints])
        (folder / "seconds").write_text(str(time.monotonic() - begun))
        (folder / "digest").write_text(digest(model))
    except (Exception, KeyboardInterrupt) as error:
        if fault is None:
            raise
        if inject is not None:
            inject.damage.close()
            load_and_train(training, folder)  # what had been saved
        save(model, folder)
        loaded = load_and_train(training, folder)
        for name, value in model.policy.state_dict().items():
            assert th.equal(value, loaded.policy.state_dict()[name]), name
        (folder / "survived").write_text(type(error).__name__)


def start(*args: Any) -> Any:
    """Start a process that trains, with the slow imports already done."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["stable_baselines3", "sb3_staq.resume"])
    process = context.Process(target=train, args=args)
    process.start()
    return process


def undisturbed(training: str) -> tuple[str, float]:
    """Train without a fault; return the digest of the training, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        start(training, Path(folder)).join()
        return (Path(folder) / "digest").read_text(), float((Path(folder) / "seconds").read_text())


def try_fault(fault: str, training: str, expected: str, seconds: float, seed: int) -> dict[str, Any] | None:
    """
    Disturb a training, and start it again; return what happened, None if the training ended before the fault.

    ``expected`` and ``seconds`` are the digest and the duration of the training without a fault, ``seed`` is that of
    the random moment.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = start(training, folder, fault, seed)
        if fault in SIGNALS:
            while process.is_alive() and not any(folder.glob("checkpoints/*")):
                time.sleep(0.01)
            process.join(random.Random(seed).uniform(0, seconds))
            during_save = any(folder.glob("checkpoints/unfinished_*"))
            if process.is_alive():
                os.kill(process.pid, SIGNALS[fault])
        else:
            during_save = INJECTED[fault] in (full_disk, no_folder)
        process.join()
        if (folder / "digest").exists():
            return None
        error = "" if process.exitcode == -signal.SIGKILL else "unusable afterwards"
        if (folder / "survived").exists():
            error = (folder / "survived").read_text()
        start(training, folder).join()
        resumed = (folder / "digest").exists() and (folder / "digest").read_text() == expected
        lost = not resumed or error == "unusable afterwards"
        return dict(fault=fault, training=training, error=error, during_save=during_save, lost=lost)


def run(folder: Path, counts: dict[str, int], trainings: Iterable[str]) -> bool:
    """
    Try each fault as often as it counts, spread over the trainings; return whether no training was lost.

    Writes ``faults.csv`` and ``report.md``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    baselines = {training: undisturbed(training) for training in trainings}
    rows: list[dict[str, Any]] = []
    for fault, count in counts.items():
        suitable = [name for name in baselines if (name == "SubprocVecEnv") == fault.startswith("worker")]
        for i in range(count):
            training = suitable[i % len(suitable)]
            expected, seconds = baselines[training]
            # Earlier and earlier, since the machine may be faster now
            tries = (try_fault(fault, training, expected, 0.9**j * seconds, seed=1000 * i + j) for j in range(20))
            row = next(filter(None, tries), None)
            if row is None:
                raise RuntimeError(f"{fault}: {training} was too quick for it")
            rows.append(row)
            print(*row.values(), flush=True)
            pd.DataFrame(rows).to_csv(folder / "faults.csv", index=False)
    table = pd.DataFrame(rows)
    sums = {"tried": ("fault", "size"), "during a save": ("during_save", "sum"), "trainings lost": ("lost", "sum")}
    summary = table.groupby("fault", sort=False).agg(**sums)
    by_training = table.groupby(["training", "fault"], sort=False)["lost"].agg(["size", "sum"])
    cells = (by_training["size"].astype(str) + " / " + by_training["sum"].astype(str)).unstack(fill_value="")
    options = f"--kills {counts['SIGKILL']} --others {counts['full disk']}"
    text = [
        "# Faults",
        f"Written by `python -m benchmarks.faults --folder FOLDER {options}`, which says what counts as lost; "
        f"commit {commit() or 'unknown'}.",
        summary.to_markdown(),
        "By training: tried / lost.",
        cells.to_markdown(),
    ]
    (folder / "report.md").write_text("\n\n".join(text) + "\n")
    return not table["lost"].any()


def main() -> int:
    """Inject faults, and return the exit status: 0 if no training was lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the results go")
    parser.add_argument("--kills", type=int, default=18, help="number of SIGKILLs")
    parser.add_argument("--others", type=int, default=6, help="number of tries of each other fault")
    args = parser.parse_args()
    counts = {name: args.kills if name == "SIGKILL" else args.others for name in (*SIGNALS, *INJECTED)}
    nothing_lost = run(args.folder, counts, TRAININGS)
    print(args.folder / "report.md")
    return 0 if nothing_lost else 1


if __name__ == "__main__":
    raise SystemExit(main())
