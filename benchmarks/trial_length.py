"""
How long must a trial of an average be? Trials simulated with the returns of evaluations that exist.

    python -m benchmarks.trial_length

A training from 200,000 to 1,000,000 steps that no longer learns: each candidate is one evaluation, drawn at random, and
the episodes of its trial are drawn from its ten. A trial lasts for 5% of the steps so far. A candidate that is ahead
then has to stay ahead until it has enough episodes. What is delivered is worth the mean of the candidate's evaluation.
"""

import csv
import math
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.statistics import relative_drawdown
from sb3_staq.average_trials import TRIAL_SHARE

FOLDER = Path(__file__).parent / "results"
N_TRAININGS, N_ENVS, EPISODE = 1000, 8, 1000
# Candidates are evaluations with a mean return above this one; the second pool of Hopper-v4 is of good ones
POOLS = (("Hopper-v4", 1000), ("Hopper-v4", 2800), ("Walker2d-v4", 1000))
# Episodes that it takes to be accepted, and whether the standard error is subtracted from their mean
RULES = ((1, False), (2, False), (3, False), (5, False), (10, False), (2, True), (5, True))


def evaluations(env_id: str, floor: float) -> list[np.ndarray]:
    """Return the returns of StaQ's evaluations from 100,000 to 200,000 steps with a mean above ``floor``."""
    pool = []
    for path in sorted([*FOLDER.glob(f"steadiness/{env_id}/*/*.csv"), *FOLDER.glob(f"mujoco/{env_id}/staq*/*.csv")]):
        if path.parent.name.endswith("_1m"):  # trainings of a million steps
            continue
        for row in csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")):
            # Where there are several averages, that of the last 15% of the training
            if int(row["step"]) >= 100_000 and row.get("window", "0.15") == "0.15" and float(row["mean"]) > floor:
                pool.append(np.array(row["returns"].split()[:10], dtype=float))
    return pool


def measure(returns: list[float], pessimistic: bool) -> float:
    """Return the mean, less its standard error if ``pessimistic``."""
    error = np.std(returns, ddof=1) / math.sqrt(len(returns)) if pessimistic else 0.0
    return float(np.mean(returns) - error)


def simulate(pool: list[np.ndarray], n_min: int, pessimistic: bool, rng: np.random.Generator) -> dict[str, float]:
    """Simulate one training: the last mean that is delivered, the mean and the best of all, the relative drawdown."""
    step, best = 200_000, -math.inf
    delivered: list[float] = []
    candidates: list[float] = []
    while step < 1_000_000:
        candidate = pool[rng.integers(len(pool))]
        returns = [rng.choice(candidate) for _ in range(math.ceil(TRIAL_SHARE * step / (EPISODE * N_ENVS)))]
        while (value := measure(returns, pessimistic)) > best and len(returns) < n_min:
            returns.append(rng.choice(candidate))
        step += len(returns) * EPISODE * N_ENVS
        candidates.append(candidate.mean())
        delivered.append(candidates[-1] if value > best else delivered[-1])
        best = max(best, value)
    drawdown = relative_drawdown(np.array(delivered))
    return dict(last=delivered[-1], mean=float(np.mean(candidates)), best=max(candidates), drawdown=drawdown)


def main() -> None:
    """Write the table."""
    rows = []
    for env_id, floor in POOLS:
        pool = evaluations(env_id, floor)
        for n_min, pessimistic in RULES:
            rng = np.random.default_rng(0)
            runs = pd.DataFrame([simulate(pool, n_min, pessimistic, rng) for _ in range(N_TRAININGS)])
            row = dict(env=env_id, floor=floor, n_evaluations=len(pool), episodes=n_min, pessimistic=pessimistic)
            row |= dict(last_to_mean=runs["last"].mean() / runs["mean"].mean())
            row |= dict(last_to_best=(runs["last"] / runs["best"]).mean(), drawdown=runs["drawdown"].mean())
            row |= {"drawdown_90": runs["drawdown"].quantile(0.9), "above_0.2": (runs["drawdown"] > 0.2).mean()}
            rows.append(row)
    pd.DataFrame(rows).to_csv(FOLDER / "steadiness" / "trial_length.csv", index=False, float_format="%.3f")


if __name__ == "__main__":
    main()
