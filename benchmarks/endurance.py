"""
A long training on a tiny environment: ``python -m benchmarks.endurance``.

It does 20,000 policy updates while the window of the average grows, and records memory, time and the drift of the
cached logit sums: their largest distance from a direct evaluation of the stack at the stored states, relative to the
largest sum. Needs Linux.
"""

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch as th
from matplotlib.figure import Figure

from benchmarks.figures import BLUE, save
from sb3_staq import StaQ
from sb3_staq.callbacks import PolicyUpdateInfo

FOLDER = Path(__file__).parent / "results" / "endurance"
N_SAMPLES = 100
STEPS_PER_UPDATE = 2
CLOCKS = (time.perf_counter, time.process_time)


def run(n_updates: int) -> pd.DataFrame:
    """Train for ``n_updates`` policy updates, and measure a hundred times: one row each."""
    th.set_num_threads(1)
    small: dict[str, Any] = dict(
        buffer_size=1000, batch_size=32, policy_kwargs=dict(net_arch=[16]), learning_starts=200
    )
    pace: dict[str, Any] = dict(train_freq=STEPS_PER_UPDATE, gradient_steps=1, policy_update_interval=STEPS_PER_UPDATE)
    model = StaQ("MlpPolicy", "CartPole-v1", **small, **pace, logit_cache=True, seed=0, device="cpu")
    rows: list[dict[str, float]] = []
    begun = [time.perf_counter(), time.process_time()]

    def measure(info: PolicyUpdateInfo) -> None:
        if model.n_policy_updates % (n_updates // N_SAMPLES):
            return
        n_steps = STEPS_PER_UPDATE * (n_updates // N_SAMPLES)
        milliseconds = [1000 * (now() - then) / n_steps for now, then in zip(CLOCKS, begun, strict=True)]
        buffer, policy = model.replay.buffer, model.policy
        states = buffer.to_torch(buffer.next_observations[: buffer.size(), 0])  # type: ignore[index]
        with th.no_grad():
            direct = policy.logit_sums(states)
            drift = (model.replay.logit_sums(states, remember=False) - direct).abs().max() / direct.abs().max()
        n_pages = int(Path("/proc/self/statm").read_text().split()[1])
        rows.append(
            {
                "policy updates": model.n_policy_updates,
                "frozen critics": len(policy.frozen_critics),
                "resident memory (MB)": n_pages * resource.getpagesize() / 1e6,
                "time per step (ms)": milliseconds[0],
                "CPU time per step (ms)": milliseconds[1],
                "relative drift of cached sums": drift.item(),
            }
        )
        begun[:] = [now() for now in CLOCKS]

    model.policy_update_hooks.append(measure)
    model.learn(200 + STEPS_PER_UPDATE * n_updates)
    return pd.DataFrame(rows)


def plot(table: pd.DataFrame) -> Figure:
    """Plot memory, time and drift over the policy updates."""
    names = [*table.columns[1:3], *table.columns[4:]]
    panels: dict[str, Any] = dict(subplots=True, layout=(2, 2), figsize=(10, 6), title=names, legend=False)
    axes = table.plot(table.columns[0], names, color=BLUE, **panels)
    for ax, name in zip(axes.flat, names, strict=True):
        ax.set_ylim(0, 1.1 * table[name].max())
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes.flat[0].figure.tight_layout()
    return axes.flat[0].figure


def main() -> None:
    """Run the long training, and write ``endurance.csv`` and ``endurance.png``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the results go")
    parser.add_argument("--updates", type=int, default=20_000, help="number of policy updates, at least a hundred")
    args = parser.parse_args()
    table = run(args.updates)
    args.folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.folder / "endurance.csv", index=False, float_format="%.4g")
    save(plot(table), args.folder / "endurance.png")
    print(args.folder / "endurance.png")


if __name__ == "__main__":
    main()
