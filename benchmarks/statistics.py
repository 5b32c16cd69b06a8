"""
Statistics of the report: how high returns are, how certain that is, and how steady a training was.

The measures of stability are those of Chan et al. 2020, "Measuring the Reliability of Reinforcement Learning
Algorithms", https://arxiv.org/abs/1912.05663, for a few dozen evaluations per training: each is taken over the whole
training, not over windows of it, and nothing is smoothed. They are losses (0 is best) in units of their input; the
report passes them scores, see :func:`normalise`. The relative drawdown and the low share have no unit.
"""

from collections.abc import Callable, Mapping
from math import ceil
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import iqr

Returns = TypeVar("Returns", float, np.ndarray)


def normalise(returns: Returns, random: float, reference: float) -> Returns:
    """Turn returns into scores that are comparable between environments: 0 is random actions, 1 the reference."""
    return (returns - random) / (reference - random)


def conditional_value_at_risk(losses: np.ndarray, alpha: float) -> float:
    """Compute the mean of the worst ``alpha`` of the losses, at least of the worst one."""
    n_worst = max(1, ceil(alpha * len(losses)))
    return float(np.sort(losses)[-n_worst:].mean())


def dispersion_across_time(curve: np.ndarray) -> float:
    """Compute the interquartile range of changes between successive evaluations: 0 for steady progress of any speed."""
    return float(iqr(np.diff(curve)))


def short_term_risk(curve: np.ndarray, alpha: float = 0.05) -> float:
    """Compute the CVaR of the drops from one evaluation to the next; a rise is a drop of 0."""
    return conditional_value_at_risk(np.maximum(-np.diff(curve), 0.0), alpha)


def drawdowns(curve: np.ndarray) -> np.ndarray:
    """Compute how far each evaluation lies below the best so far."""
    return np.maximum.accumulate(curve) - curve


def long_term_risk(curve: np.ndarray, alpha: float = 0.05) -> float:
    """Compute the CVaR of the drawdowns."""
    return conditional_value_at_risk(drawdowns(curve), alpha)


def relative_drawdown(curve: np.ndarray) -> float:
    """
    Compute the largest drawdown as a share of the best evaluation of the whole training.

    Evaluations are counted from the return that is worth nothing. The share is above 1 if the training falls below
    that return, and NaN if it never rises above it.
    """
    return float(drawdowns(curve).max() / curve.max()) if _is_worth_something(curve) else float("nan")


def _is_worth_something(curve: np.ndarray) -> bool:
    """Tell whether any evaluation is above 0, by more than the rounding error of a mean that would be 0."""
    return bool(curve.max() > 1e-9 * np.abs(curve).max())


def resampled_drawdown(returns: np.ndarray, n_resamples: int = 1000) -> float:
    """
    Compute the mean relative drawdown if the episodes of each evaluation are drawn again, with replacement.

    Evaluations on the same seeds repeat themselves if the policy has not changed, so they hide how its returns vary.

    :param returns: counted from the return that is worth nothing, shape (number of evaluations, number of episodes)
    :return: the mean over the draws that have a relative drawdown; NaN if the evaluations as they were have none
    """
    if np.isnan(relative_drawdown(returns.mean(axis=1))):
        return float("nan")
    draws = np.random.default_rng(0).integers(returns.shape[1], size=(n_resamples, *returns.shape))
    curves = np.take_along_axis(returns[np.newaxis], draws, axis=2).mean(axis=2)
    shares = np.array([relative_drawdown(curve) for curve in curves])
    known = shares[~np.isnan(shares)]
    return float(known.mean()) if len(known) else float("nan")


def low_share(curve: np.ndarray, level: float = 0.75) -> float:
    """Compute the share of second-half evaluations below ``level`` of the overall best, counted from the same zero."""
    if not _is_worth_something(curve):
        return float("nan")
    return float(np.mean(curve[len(curve) // 2 :] < level * curve.max()))


def keep_best(returns: np.ndarray, n_splits: int = 200) -> list[np.ndarray]:
    """
    Find the episodes of a training that keeps its best model so far, as SB3's ``EvalCallback`` does.

    Half of the episodes of each evaluation choose the model, and the other half tell its return, since the ones that
    choose may have been lucky. They are dealt at random, since they are stored in the order in which they ended.

    :param returns: shape (number of evaluations, number of episodes), at least two episodes
    :param n_splits: number of times that the episodes are dealt
    :return: for each time, the returns that the best model so far has in the other half, one row for each evaluation
    """
    rng, kept = np.random.default_rng(0), []
    for _ in range(n_splits):
        choosing, telling = np.array_split(rng.permuted(returns, axis=1), 2, axis=1)
        means = choosing.mean(axis=1)
        kept.append(telling[[means[: i + 1].argmax() for i in range(len(means))]])
    return kept


def time_to_return(times: ArrayLike, returns: ArrayLike, target: float) -> float:
    """Find the time of the first evaluation that is not below a given return, infinity if there is none."""
    reached = np.asarray(returns) >= target
    return float(np.asarray(times)[reached.argmax()]) if reached.any() else float("inf")


def bootstrap(
    scores: Mapping[str, np.ndarray], function: Callable[[np.ndarray], np.ndarray], n_resamples: int = 2000
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """
    Compute statistics with 95% confidence intervals: a percentile bootstrap that resamples runs per environment.

    Scores, by algorithm, have the shape (number of runs, number of environments), intervals (2, number of statistics).
    """
    from rliable.library import get_interval_estimates  # takes seconds

    state = np.random.get_state()
    np.random.seed(0)  # the same report from the same results: rliable draws from the global generator
    try:
        return get_interval_estimates(scores, function, reps=n_resamples)
    finally:
        np.random.set_state(state)
