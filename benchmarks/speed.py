"""
How fast StaQ is, in ratios that one run measures: ``python -m benchmarks.speed --folder FOLDER``.

Each measure runs in a process of its own, on one thread, in turn with what it is compared to, so that a drift of the
machine's speed hits both alike. Only public methods are called: ``--against CLONE`` measures another version of the
package beside this one. ``SB3_STAQ_PLAIN_KERNELS=1`` is one of the variants: its ratio is the gain of the kernels.
"""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEASURES = {
    "dqn gradient step": "DQN, CartPole-v1, batch 256, 256 x 256 units; per network",
    "gradient step": "StaQ, the same; per network of the ensemble of two",
    "box gradient step": "StaQ, HalfCheetah-v4 with default arguments",
    "iteration M=1, 1 env": "environment steps with gradient steps and the policy updates that are due; CartPole-v1",
    "iteration M=300, 1 env": "the same with a full stack of 300",
    "iteration M=1, 8 envs": "the same with 8 environments",
    "iteration M=300, 8 envs": "the same with a full stack of 300 and 8 environments",
    "act M=50, 1 row": "policy.predict, greedy, by the last policy",
    "act M=300, 1 row": "the same with a stack of 300",
    "act average, 1 row": "the same by the average of 60 critics",
    "act M=300, 64 rows": "64 observations at once",
    "act average, 64 rows": "64 observations at once",
    "sac step": "SAC of SB3, HalfCheetah-v4, RL Zoo's settings: environment step and gradient step",
    "box step": "StaQ, HalfCheetah-v4, 8 environments, default arguments: the same",
}
RATIOS = [
    ("gradient step", "dqn gradient step", "a gradient step per network takes this share of DQN's"),
    ("iteration M=300, 1 env", "iteration M=1, 1 env", "a stack of 300 makes an iteration so many times as long"),
    ("iteration M=300, 8 envs", "iteration M=1, 8 envs", "the same with 8 environments"),
    ("box step", "sac step", "a step of Box defaults takes this share of SAC's"),
]


def make(env_id: str, memory_size: int, n_envs: int = 1, **kwargs: Any) -> Any:
    """
    Make a model with a full stack of random critics and a replay buffer of random data.

    :param env_id: the environment
    :param memory_size: number of frozen critics
    :param n_envs: number of environments
    :param kwargs: arguments of StaQ
    :return: the model
    """
    import inspect

    import torch as th
    from stable_baselines3.common.env_util import make_vec_env

    from sb3_staq import StaQ

    if "eval_policy" not in inspect.signature(StaQ).parameters:  # an older version
        kwargs.pop("eval_policy", None)
    env = make_vec_env(env_id, n_envs, seed=0)
    model = StaQ("MlpPolicy", env, memory_size=memory_size, learning_starts=1000, seed=0, device="cpu", **kwargs)
    model.learn(1000)
    for _ in range(memory_size):
        for param in model.policy.additive_critics.parameters():
            param.data.normal_(0, 0.05)
        model.policy.push_critics(1.0, 0.05)
    th.set_num_threads(1)
    return model


def timed(function: Callable[[], Any], n: int) -> float:
    """
    Time a function with PyTorch's benchmark tool, after a warm-up.

    :param function: the function
    :param n: number of calls
    :return: seconds per call
    """
    from torch.utils.benchmark import Timer

    function()
    return Timer("function()", globals={"function": function}).timeit(n).mean


def measure(name: str, scale: float) -> float:
    """
    Do one measurement.

    :param name: one of ``MEASURES``
    :param scale: 1 for the real numbers of steps, less for a test
    :return: seconds
    """
    import numpy as np
    import torch as th
    from stable_baselines3 import DQN, SAC
    from stable_baselines3.common.logger import configure

    th.set_num_threads(1)
    n = max(1, round(100 * scale))
    if name == "dqn gradient step":
        dqn = DQN("MlpPolicy", "CartPole-v1", policy_kwargs=dict(net_arch=[256, 256]), learning_starts=1000, seed=0)
        dqn.learn(1000)
        dqn.set_logger(configure(None, []))
        return timed(lambda: dqn.train(n, 256), 5) / n
    if name == "sac step":
        sac = SAC("MlpPolicy", "HalfCheetah-v4", learning_starts=1000, seed=0, device="cpu")
        sac.learn(1000)
        return timed(lambda: sac.learn(2 * n, reset_num_timesteps=False), 3) / (2 * n)
    if name == "box step":
        model = make("HalfCheetah-v4", 4, n_envs=8, train_freq=1, gradient_steps=8)
        return timed(lambda: model.learn(8 * n, reset_num_timesteps=False), 3) / (8 * n)
    if name.endswith("gradient step"):
        model = make("HalfCheetah-v4" if name.startswith("box") else "CartPole-v1", 4)
        model.policy_update_interval = 10**9
        seconds = timed(lambda: model.train(n, model.batch_size), 5) / n
        return seconds if name.startswith("box") else seconds / 2
    if name.startswith("iteration"):
        memory_size, n_envs = (int(part.strip(" Menvs=")) for part in name.removeprefix("iteration").split(","))
        settings = dict(buffer_size=50_000, kl_coef=20.0, ent_coef=0.4, policy_update_interval=1000, logit_cache=True)
        model = make("CartPole-v1", memory_size, n_envs, train_freq=4, **settings)
        n_steps = round(2000 * scale)
        return timed(lambda: model.learn(n_steps, reset_num_timesteps=False), 1) / n_steps
    rows = int(name.split(",")[1].split()[0])
    average = "average" in name
    memory_size = 60 if average else int(name.split("=")[1].split(",")[0])
    model = make("CartPole-v1", memory_size, kl_coef=20.0, ent_coef=0.4, eval_policy="average" if average else "last")
    model.policy.frozen_critics.average_window = 1.0
    obs = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
    return timed(lambda: model.policy.predict(obs, deterministic=True), 2 * n)


def run(folder: Path, repetitions: int, scale: float, against: Path | None, names: list[str]) -> Path:
    """
    Measure everything in turn, and write ``speed.csv`` and ``report.md``.

    :param folder: where to write
    :param repetitions: how often each measurement is done
    :param scale: 1 for the real numbers of steps
    :param against: a clone of another version
    :param names: which measurements
    :return: the report
    """
    import pandas as pd

    here = Path(__file__).resolve().parent.parent
    variants = {"this version": (here, "0"), "plain kernels": (here, "1")}
    if against is not None:
        variants["other version"] = (against.resolve(), "0")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for repetition in range(repetitions):
        for name in names:
            for variant, (path, plain) in variants.items():
                if name.split()[0] in ("dqn", "sac") and variant != "this version":
                    continue
                if "average" in name and variant == "other version":
                    continue
                env = {**os.environ, "PYTHONPATH": str(path), "SB3_STAQ_PLAIN_KERNELS": plain, "OMP_NUM_THREADS": "1"}
                # This file, with the other version's package
                code = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r}, run_name='__main__')"
                command = [sys.executable, "-c", code, "--measure", name, "--scale", str(scale)]
                output = subprocess.run(command, env=env, check=True, capture_output=True, text=True, cwd=folder)
                rows.append((name, variant, repetition, float(output.stdout.split()[-1])))
                print(f"{name:24} {variant:14} {1000 * rows[-1][-1]:.3f} ms", flush=True)
    data = pd.DataFrame(rows, columns=["measure", "variant", "repetition", "seconds"])
    data.to_csv(folder / "speed.csv", index=False)
    table = 1000 * data.groupby(["measure", "variant"])["seconds"].median().unstack()
    table = table.reindex([name for name in MEASURES if name in table.index])
    for variant in table.columns.drop("this version"):
        table[f"{variant} / this"] = table[variant] / table["this version"]
    table["what"] = [MEASURES[name] for name in table.index]
    lines = [
        "# Speed",
        "",
        f"Medians of {repetitions} in milliseconds, one thread, {platform.machine()}, measured in turn by `python -m "
        f"benchmarks.speed --repetitions {repetitions}{' --against CLONE' if against else ''} --folder FOLDER`.",
        "",
        table.to_markdown(floatfmt=".3g"),
        "",
    ]
    own = data[data["variant"] == "this version"].pivot(index="repetition", columns="measure", values="seconds")
    for numerator, denominator, text in RATIOS:
        if {numerator, denominator} <= set(own):
            ratio = own[numerator] / own[denominator]
            lines.append(f"- {text}: {ratio.median():.2f} ({ratio.min():.2f} to {ratio.max():.2f})")
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    return folder / "report.md"


def main() -> None:
    """Measure the speed of StaQ."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=Path("speed"), help="where the results go")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--against", type=Path, help="a clone of another version, measured in turn")
    parser.add_argument("--scale", type=float, default=1.0, help="less than 1 for a short try")
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES), metavar="MEASURE")
    parser.add_argument("--measure", choices=list(MEASURES), help="do one measurement in this process")
    args = parser.parse_args()
    if args.measure:
        print(measure(args.measure, args.scale))
    else:
        print(run(args.folder, args.repetitions, args.scale, args.against, args.only))


if __name__ == "__main__":
    main()
