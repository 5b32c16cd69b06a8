"""
How long must a trial of an average be? Trials simulated with the returns of evaluations that exist.

    python -m benchmarks.trial_length

Three kinds of trainings. One no longer learns, from 200,000 to 1,000,000 steps: each candidate is one evaluation of the
task, drawn at random. One learns, from 10,000 steps on: each candidate is what a training of HalfCheetah-v4 returned at
that step. One stands still, from 350,000 steps on, with the best average of a training of Walker2d-v4: each candidate
is the one that was accepted there at 850,000 steps, and often falls. The episodes of a trial are drawn from the ten of
the evaluation (from all since 850,000 steps for the training that stands still), and a trial lasts for 5% of the steps
so far. A candidate that is ahead then is accepted if it is ahead by enough standard errors, or stays ahead until it has
enough episodes. What is delivered is worth the mean of the candidate's evaluation.
"""

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.statistics import relative_drawdown
from sb3_staq.average_trials import FORGETTING, TRIAL_SHARE, standard_error

FOLDER = Path(__file__).parent / "results"
N_TRAININGS, N_ENVS, EPISODE, STEPS = 1000, 8, 1000, 1_000_000
# Candidates are evaluations with a mean return above this one; the second pool of Hopper-v4 is of good ones
POOLS = (("Hopper-v4", 1000), ("Hopper-v4", 2800), ("Walker2d-v4", 1000))
LEARNING = "steadiness/HalfCheetah-v4/mixed_1m/seed_10.csv"
STANDING = "mujoco_1m/Walker2d-v4/staq_five/seed_52.csv"
# Episodes that it takes to be accepted, and standard errors that are enough with fewer; with None, nothing is
RULES = ((1, None), (3, None), (5, None), (10, None), (5, 1.0), (5, 2.0), (5, 3.0), (10, 2.0), (20, 2.0))


def evaluations(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Read the step and the ten returns of each evaluation of the average over the last 15% of the training."""
    for row in csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")):
        if row.get("window", "0.15") == "0.15" and row.get("evaluation", "training") == "training":
            yield int(row["step"]), np.array(row["returns"].split()[:10], dtype=float)


def pool_of(env_id: str, floor: float) -> list[np.ndarray]:
    """Return the returns of StaQ's evaluations from 100,000 to 200,000 steps with a mean above ``floor``."""
    paths = sorted([*FOLDER.glob(f"steadiness/{env_id}/*/*.csv"), *FOLDER.glob(f"mujoco/{env_id}/staq*/*.csv")])
    short = [path for path in paths if not path.parent.name.endswith("_1m")]
    found = [x for path in short for step, x in evaluations(path) if step >= 100_000]
    return [returns for returns in found if returns.mean() > floor]


def simulate(
    candidate_at: Callable[[int], np.ndarray],
    step: int,
    best: float,
    enough: int,
    errors: float | None,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Simulate one training: the worth of each candidate, when it was taken, when its trial ended, and how."""
    squares, freedom = 0.0, 0.0
    trials = [(step, step, best, True)] if math.isfinite(best) else []
    while step < STEPS:
        candidate, taken = candidate_at(step), step
        returns: list[float] = []
        is_open = True
        while is_open:
            returns.append(rng.choice(candidate))
            step += EPISODE * N_ENVS
            n, mean = len(returns), float(np.mean(returns))
            error, squares_now, freedom_now = standard_error(returns, squares, freedom)
            is_clear = errors is not None and mean - best >= errors * error
            is_open = step - taken < TRIAL_SHARE * step or (mean > best and n < enough and not is_clear)
        trials.append((taken, step, candidate.mean(), mean > best))
        best, squares, freedom = max(best, mean), FORGETTING * squares_now, FORGETTING * freedom_now
    return pd.DataFrame(trials, columns=["taken", "ended", "worth", "accepted"])


def measure(trials: pd.DataFrame, curve: dict[int, np.ndarray] | None) -> tuple[float, float]:
    """Return the delivered worth as a share of the best so far, on average over the steps, and its drawdown."""
    accepted = trials[trials["accepted"]]
    # As long as nothing is accepted, the present average of a training that learns is delivered
    steps = np.arange(accepted["ended"].iloc[0] if curve is None else trials["taken"][0], STEPS, 10_000)
    last = np.searchsorted(accepted["ended"], steps, side="right") - 1
    present = np.zeros(len(steps)) if curve is None else np.array([curve[step].mean() for step in steps])
    delivered = np.where(last < 0, present, accepted["worth"].to_numpy()[last])
    taken = np.searchsorted(trials["taken"], steps, side="right") - 1
    best = np.maximum.accumulate(trials["worth"].to_numpy())[taken]
    return delivered.mean() / best.mean(), relative_drawdown(delivered)


def main() -> None:
    """Write the table."""
    learning, standing = (dict(evaluations(FOLDER / path)) for path in (LEARNING, STANDING))
    lucky = [returns for step, returns in standing.items() if step >= 850_000]
    # Task, floor of the pool, first step, best return at it, and the candidates: any of these, or by the step
    trainings: list[tuple[str, int | None, int, float, list[np.ndarray] | dict[int, np.ndarray]]]
    trainings = [(env_id, floor, 200_000, -math.inf, pool_of(env_id, floor)) for env_id, floor in POOLS]
    trainings += [("HalfCheetah-v4, learning", None, 10_000, -math.inf, learning)]
    trainings += [("Walker2d-v4, standing still", None, 350_000, standing[840_000].mean(), [np.concatenate(lucky)])]
    rows = []
    for name, floor, start, best, candidates in trainings:
        curve = candidates if isinstance(candidates, dict) else None
        for enough, errors in RULES:
            rng = np.random.default_rng(0)

            def candidate_at(step: int, rng=rng, candidates=candidates, curve=curve) -> np.ndarray:
                return candidates[rng.integers(len(candidates)) if curve is None else step // 10_000 * 10_000]

            runs = (simulate(candidate_at, start, best, enough, errors, rng) for _ in range(N_TRAININGS))
            share, drawdown = np.transpose([measure(trials, curve) for trials in runs])
            row = dict(env=name, floor=floor, n_evaluations=len(candidates), episodes=enough, errors=errors)
            row |= dict(delivered_to_best=share.mean(), drawdown=drawdown.mean())
            row |= {"drawdown_90": np.quantile(drawdown, 0.9), "above_0.2": (drawdown > 0.2).mean()}
            rows.append(row)
    path = FOLDER / "steadiness" / "trial_length.csv"
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.3f")
    print(path)


if __name__ == "__main__":
    main()
