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

FOLDER = Path(__file__).parent / "results"
N_TRAININGS, N_ENVS, EPISODE, TRIAL_SHARE = 1000, 8, 1000, 0.05
# Candidates are evaluations with a mean return above this one; the second pool of Hopper-v4 is of good ones
POOLS = (("Hopper-v4", 1000), ("Hopper-v4", 2800), ("Walker2d-v4", 1000))
# Episodes that it takes to be accepted, and whether the standard error is subtracted from their mean
RULES = ((1, False), (2, False), (3, False), (5, False), (10, False), (2, True), (5, True))
HEADER = "env floor n_evaluations episodes pessimistic last_to_mean last_to_best drawdown drawdown_90 above_0.2".split()


def evaluations(env_id: str, floor: float) -> list[np.ndarray]:
    """Return the returns of all evaluations of StaQ from 100,000 steps on with a mean above ``floor``."""
    pool = []
    for path in sorted([*FOLDER.glob(f"*/{env_id}/*/seed_*.csv")]):
        if path.parent.name in ("sac", "ppo", "trpo", "td3"):
            continue
        for row in csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")):
            # Where there are several averages, that of the last 15% of the training
            if int(row["step"]) >= 100_000 and row.get("window", "0.15") == "0.15" and float(row["mean"]) > floor:
                pool.append(np.array(row["returns"].split()[:10], dtype=float))
    return pool


def mean(returns: list[float], pessimistic: bool) -> float:
    """Return the mean, less its standard error if ``pessimistic``."""
    error = np.std(returns, ddof=1) / math.sqrt(len(returns)) if pessimistic else 0.0
    return float(np.mean(returns) - error)


def simulate(pool: list[np.ndarray], n_min: int, pessimistic: bool, rng: np.random.Generator) -> tuple[float, ...]:
    """Return the last delivered mean, that of the candidates, the best one of them, and the relative drawdown."""
    step, best = 200_000, -math.inf
    delivered: list[float] = []
    candidates: list[float] = []
    while step < 1_000_000:
        candidate = pool[rng.integers(len(pool))]
        returns = [rng.choice(candidate) for _ in range(math.ceil(TRIAL_SHARE * step / (EPISODE * N_ENVS)))]
        while (measure := mean(returns, pessimistic)) > best and len(returns) < n_min:
            returns.append(rng.choice(candidate))
        step += len(returns) * EPISODE * N_ENVS
        candidates.append(candidate.mean())
        delivered.append(candidates[-1] if measure > best else delivered[-1])
        best = max(best, measure)
    so_far = np.maximum.accumulate(delivered)
    return delivered[-1], float(np.mean(candidates)), max(candidates), float(((so_far - delivered) / so_far).max())


def main() -> None:
    """Write the table."""
    with open(FOLDER / "steadiness" / "trial_length.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for env_id, floor in POOLS:
            pool = evaluations(env_id, floor)
            for n_min, pessimistic in RULES:
                rng = np.random.default_rng(0)
                runs = np.array([simulate(pool, n_min, pessimistic, rng) for _ in range(N_TRAININGS)])
                last, average, best, drawdown = runs.T
                numbers = (
                    *(last.mean() / average.mean(), np.mean(last / best)),
                    *(drawdown.mean(), np.quantile(drawdown, 0.9), np.mean(drawdown > 0.2)),
                )
                writer.writerow([env_id, floor, len(pool), n_min, pessimistic, *(f"{x:.3f}" for x in numbers)])


if __name__ == "__main__":
    main()
