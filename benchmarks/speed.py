"""
How fast StaQ is, as ratios measured within one run: ``python -m benchmarks.speed --folder FOLDER``.

Each measure runs in its own process, on one thread, in turn with what it is compared to, so that a drift of the
machine's speed affects both alike; times are CPU times. Variants are the package with all fast paths of its kernels
turned off, or one of them, and another version of it (``--against CLONE``).
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch as th
from sb3_contrib import CrossQ
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.env_util import make_vec_env
from torch.utils.benchmark import Timer

from sb3_staq import StaQ, kernels

HERE = Path(__file__).resolve()
# Does something that many times: environment steps, gradient steps or actions
Work = Callable[[int], Any]


def full_stack(env_id: str, n_envs: int = 1, n_updates: int | None = None, **kwargs: Any) -> Any:
    """Make a StaQ model with a full stack of random critics and a replay buffer of random data."""
    env = make_vec_env(env_id, n_envs, seed=0)
    model = StaQ("MlpPolicy", env, learning_starts=1000, seed=0, device="cpu", **kwargs)
    model.learn(1000)
    for _ in range(n_updates or model.policy.memory_size):
        for param in model.policy.additive_critics.parameters():
            param.data.normal_(0, 0.05)
        model.policy.push_critics(1.0, 0.05)
    th.set_num_threads(1)
    return model


def steps(model: Any) -> Work:
    """Prepare environment steps with the gradient steps and policy updates that are due."""
    return lambda n: model.learn(n, reset_num_timesteps=False)


def gradient_steps(model: Any, batch_size: int, n_networks: int) -> Work:
    """Prepare gradient steps alone, per network."""
    model.policy_update_interval = 10**9
    return lambda n: model.train(n // n_networks, batch_size)


def iteration(memory_size: int, n_envs: int) -> Work:
    """Prepare iterations: a policy update, and the 1000 environment steps before it."""
    settings: dict[str, Any] = dict(
        buffer_size=50_000, kl_coef=20.0, ent_coef=0.4, policy_update_interval=1000, logit_cache=True
    )
    return steps(full_stack("CartPole-v1", n_envs, memory_size=memory_size, train_freq=4, **settings))


def million() -> Work:
    """Prepare environment steps with the MuJoCo settings of ``hyperparams/staq.yml``."""
    settings: dict[str, Any] = dict(train_freq=1, gradient_steps=8, average_share=0.5, eval_policy="best")
    model = full_stack("HalfCheetah-v4", 8, n_updates=400, **settings)  # 15% of them are a whole average
    model.policy.frozen_critics.propose(accept=False)
    return steps(model)


def actions(n_rows: int, memory_size: int, eval_policy: str) -> Work:
    """Prepare greedy actions at ``n_rows`` observations at once."""
    policy = full_stack("CartPole-v1", memory_size=memory_size, kl_coef=20.0, ent_coef=0.4).policy
    policy.eval_policy, policy.frozen_critics.average_window = eval_policy, 1.0
    obs = np.random.default_rng(0).normal(size=(n_rows, 4)).astype(np.float32)
    return lambda n: [policy.predict(obs, deterministic=True) for _ in range(n)]


def train(env_id: str, batch_size: int, n_networks: int) -> Work:
    """Prepare gradient steps of StaQ with default arguments."""
    return gradient_steps(full_stack(env_id), batch_size, n_networks)


def dqn() -> Work:
    """Prepare gradient steps of SB3's DQN."""
    model = DQN("MlpPolicy", "CartPole-v1", policy_kwargs=dict(net_arch=[256, 256]), learning_starts=1000, seed=0)
    return gradient_steps(model.learn(1000), 256, 1)


def rival(algo: type[SAC] | type[CrossQ], n_envs: int = 1, **kwargs: Any) -> Work:
    """Prepare environment steps of another algorithm for Box action spaces."""
    env = make_vec_env("HalfCheetah-v4", n_envs, seed=0)
    return steps(algo("MlpPolicy", env, learning_starts=1000, seed=0, device="cpu", **kwargs).learn(1000))


class Measure(NamedTuple):
    """Something whose CPU time is measured."""

    n: int  # how often it is done
    what: str
    prepare: Callable[[], Work]
    in_all_variants: bool = True  # not so: other algorithms
    in_other_versions: bool = True  # not so: what 0.1.0 did not have


MEASURES = {
    "dqn gradient step": Measure(
        500, "DQN, CartPole-v1, batch 256, 256 x 256 units; per network", dqn, in_all_variants=False
    ),
    "gradient step": Measure(
        1000, "StaQ, the same; per network of the ensemble of two", lambda: train("CartPole-v1", 256, 2)
    ),
    "box gradient step": Measure(
        500, "StaQ, HalfCheetah-v4 with default arguments", lambda: train("HalfCheetah-v4", 128, 1)
    ),
    "iteration M=1, 1 env": Measure(
        2000,
        "environment steps with gradient steps and the policy updates that are due; CartPole-v1",
        lambda: iteration(1, 1),
    ),
    "iteration M=300, 1 env": Measure(2000, "the same with a full stack of 300", lambda: iteration(300, 1)),
    "iteration M=1, 8 envs": Measure(2000, "the same with 8 environments", lambda: iteration(1, 8)),
    "iteration M=300, 8 envs": Measure(
        2000, "the same with a full stack of 300 and 8 environments", lambda: iteration(300, 8)
    ),
    "act M=50, 1 row": Measure(200, "policy.predict, greedy, by the last policy", lambda: actions(1, 50, "last")),
    "act M=300, 1 row": Measure(200, "the same with a stack of 300", lambda: actions(1, 300, "last")),
    "act average, 1 row": Measure(
        200, "the same by the average of 60 critics", lambda: actions(1, 60, "average"), in_other_versions=False
    ),
    "act M=300, 64 rows": Measure(200, "64 observations at once", lambda: actions(64, 300, "last")),
    "act average, 64 rows": Measure(
        200, "64 observations at once", lambda: actions(64, 60, "average"), in_other_versions=False
    ),
    "cartpole step": Measure(
        2000,
        "StaQ, CartPole-v1, default arguments: environment step, gradient steps and policy updates",
        lambda: steps(full_stack("CartPole-v1")),
    ),
    "sac step": Measure(
        600,
        "SAC of SB3, HalfCheetah-v4, RL Zoo's settings: environment step and gradient step",
        lambda: rival(SAC),
        in_all_variants=False,
    ),
    "sac step, 8 envs": Measure(
        1200,
        "the same with StaQ's batches of 128 and 8 environments",
        lambda: rival(SAC, 8, batch_size=128, train_freq=1, gradient_steps=8),
        in_all_variants=False,
    ),
    "crossq step": Measure(
        60,
        "CrossQ of sb3-contrib with its default arguments, one environment: the same",
        lambda: rival(CrossQ),
        in_all_variants=False,
    ),
    "box step": Measure(
        2400,
        "StaQ, HalfCheetah-v4, 8 environments, default arguments: the same",
        lambda: steps(full_stack("HalfCheetah-v4", 8, train_freq=1, gradient_steps=8)),
    ),
    "box step, average": Measure(
        2400,
        "the same, and half of the environments act by an average of 60 critics",
        million,
        in_other_versions=False,
    ),
}
RATIOS = [
    ("gradient step", "dqn gradient step", "a gradient step per network takes this share of DQN's"),
    ("iteration M=300, 1 env", "iteration M=1, 1 env", "a stack of 300 makes an iteration so many times as long"),
    ("iteration M=300, 8 envs", "iteration M=1, 8 envs", "the same with 8 environments"),
    ("box step", "sac step", "a step of Box defaults takes this share of SAC's"),
    (
        "box step, average",
        "sac step",
        "a step of Box where half of the environments act by an average takes this share of SAC's",
    ),
    ("box step, average", "sac step, 8 envs", "the same, and SAC with the same batches and environments"),
    ("crossq step", "box step", "a step of CrossQ takes so many times as long as one of Box defaults"),
]
# More bytes than anything has
UNLIMITED = 2**62
# Variants, and what they replace in the kernels of this version
VARIANTS: dict[str, dict[str, int]] = {
    "this version": {},
    "plain kernels": {},  # by the environment variable
    "no large pages": {"LARGE_PAGE_BYTES": UNLIMITED},
    "no read-ahead": {"READ_AHEAD_BYTES": UNLIMITED},
    "no few rows": {"FEW_ROWS": 0},
    "other version": {},
}


def measure(name: str, variant: str, scale: float) -> float:
    """Do one measurement in this process, and return CPU seconds."""
    th.set_num_threads(1)
    vars(kernels).update(VARIANTS[variant])
    work, n = MEASURES[name].prepare(), max(8, round(MEASURES[name].n * scale / 4))
    work(8)  # warm-up
    times = Timer("work(n)", globals={"work": work, "n": n}, timer=time.process_time).timeit(4)
    return times.mean / n


def run(
    folder: Path, repetitions: int, scale: float, names: list[str], variants: list[str], against: Path | None = None
) -> Path:
    """Measure this version, ``variants`` of it and the clone ``against`` in turn; return the report's path."""
    variants = ["this version", *variants, *(["other version"] if against else [])]
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for repetition, name, variant in product(range(repetitions), names, variants):
        if not (variant == "this version" or MEASURES[name].in_all_variants):
            continue
        if variant == "other version" and not MEASURES[name].in_other_versions:
            continue
        path = against.resolve() if against and variant == "other version" else HERE.parents[1]
        env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
        env["SB3_STAQ_PLAIN_KERNELS"] = str(int(variant == "plain kernels"))
        # This file, with the other version's package
        code = f"import runpy; runpy.run_path({str(HERE)!r}, run_name='__main__')"
        command = [sys.executable, "-c", code, "--measure", name, variant, "--scale", str(scale)]
        output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True, cwd=folder)
        rows.append((name, variant, repetition, float(output.stdout.split()[-1])))
        print(f"{name:24} {variant:14} {1000 * rows[-1][-1]:.3f} ms", flush=True)
    data = pd.DataFrame(rows, columns=["measure", "variant", "repetition", "seconds"])
    data.to_csv(folder / "speed.csv", index=False)
    (folder / "report.md").write_text(report(data, variants))
    return folder / "report.md"


def report(data: pd.DataFrame, variants: list[str]) -> str:
    """Write a report that compares the measurements, the rows of ``data``."""
    times = data.pivot(index=["measure", "repetition"], columns="variant", values="seconds")[variants]
    table = 1000 * times.groupby("measure").median()
    ratios = times.div(times["this version"], axis=0).groupby("measure").median().drop(columns="this version")
    table = table.join(ratios.add_suffix(" / this")).reindex([name for name in MEASURES if name in table.index])
    table["what"] = [MEASURES[name].what for name in table.index]
    own = times["this version"].unstack("measure")
    lines = []
    for numerator, denominator, text in RATIOS:
        if {numerator, denominator} <= set(own):
            ratio = own[numerator] / own[denominator]
            lines.append(f"- {text}: {ratio.median():.2f} ({ratio.min():.2f} to {ratio.max():.2f})\n")
    return (
        f"# Speed\n\nMedians of {len(own)} in milliseconds of CPU time, one thread, {platform.machine()}, "
        "measured in turn by `python -m benchmarks.speed`; ratios are medians of those within a turn.\n\n"
        f"{table.to_markdown(floatfmt='.3g')}\n\n{''.join(lines)}"
    )


def main() -> None:
    """Measure the speed of StaQ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=Path("speed"), help="where the results go")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--against", type=Path, help="a clone of another version, measured in turn")
    parser.add_argument("--scale", type=float, default=1.0, help="less than 1 for a short try")
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES), metavar="MEASURE")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS)[1:-1], default=["plain kernels"])
    parser.add_argument("--measure", nargs=2, help="do one measurement in this process: measure and variant")
    args = parser.parse_args()
    if args.measure:
        name, variant = args.measure
        print(measure(name, variant, args.scale))
    else:
        print(run(args.folder, args.repetitions, args.scale, args.only, args.variants, args.against))


if __name__ == "__main__":
    main()
