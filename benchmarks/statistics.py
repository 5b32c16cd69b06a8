"""
What the report says about returns: how high they are, how sure that is, and how stable the training was.

The measures of stability are those of Chan et al. 2020, "Measuring the Reliability of Reinforcement Learning
Algorithms", https://arxiv.org/abs/1912.05663, for a few dozen evaluations per training: each is taken over the whole
training, not over windows of it, and nothing is smoothed. All of them are losses, 0 is best. They are in units of their
input; the report gives them scores, see :func:`normalise`, so that environments can be compared.
"""

from collections.abc import Callable, Mapping
from math import ceil
from typing import TypeVar

import numpy as np
from scipy.stats import iqr

Returns = TypeVar("Returns", float, np.ndarray)


def normalise(returns: Returns, random: float, reference: float) -> Returns:
    """
    Returns as scores, which can be compared between environments: 0 is random actions, 1 the environment's reference.

    :param returns: returns of an environment
    :param random: the return that counts as 0
    :param reference: the return that counts as 1
    :return: scores
    """
    return (returns - random) / (reference - random)


def conditional_value_at_risk(losses: np.ndarray, alpha: float) -> float:
    """
    What to expect in the bad cases: the mean of the worst ``alpha`` of the losses, at least of the worst one.

    :param losses: observed losses
    :param alpha: share of the bad cases
    :return: their mean
    """
    n_worst = max(1, ceil(alpha * len(losses)))
    return float(np.sort(losses)[-n_worst:].mean())


def dispersion_across_time(curve: np.ndarray) -> float:
    """
    How unsteady a training is: interquartile range of the differences between successive evaluations. The differences
    detrend the curve, steady progress of any speed has dispersion 0.

    :param curve: the evaluations of one training
    :return: interquartile range
    """
    return float(iqr(np.diff(curve)))


def short_term_risk(curve: np.ndarray, alpha: float = 0.05) -> float:
    """
    How far a training falls from one evaluation to the next, in the worst ``alpha`` of the cases (CVaR of the drops; an
    evaluation that is not below the one before is a drop of 0).

    :param curve: the evaluations of one training
    :param alpha: share of the worst cases
    :return: conditional value at risk
    """
    return conditional_value_at_risk(np.maximum(-np.diff(curve), 0.0), alpha)


def long_term_risk(curve: np.ndarray, alpha: float = 0.05) -> float:
    """
    How far a training is below the best that it has already reached, in the worst ``alpha`` of the cases (CVaR of the
    drawdowns).

    :param curve: the evaluations of one training
    :param alpha: share of the worst cases
    :return: conditional value at risk
    """
    return conditional_value_at_risk(np.maximum.accumulate(curve) - curve, alpha)


def dispersion_across_runs(curves: np.ndarray) -> float:
    """
    How much trainings differ that differ in their seeds only: interquartile range between them at each evaluation,
    averaged over the evaluations.

    :param curves: evaluations of the trainings, shape (number of trainings, number of evaluations)
    :return: mean interquartile range
    """
    return float(np.mean(iqr(curves, axis=0)))


def dispersion_across_episodes(returns: np.ndarray) -> float:
    """
    How much episodes of one trained policy differ: interquartile range of their returns.

    :param returns: the returns of the episodes
    :return: interquartile range
    """
    return float(iqr(returns))


def bootstrap(
    scores: Mapping[str, np.ndarray], function: Callable[[np.ndarray], np.ndarray], n_resamples: int = 2000
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """
    Statistics with 95% confidence intervals: a percentile bootstrap that draws runs anew within each environment.

    :param scores: by algorithm, scores of shape (number of runs, number of environments)
    :param function: gives a vector of statistics of such scores
    :param n_resamples: number of draws
    :return: by algorithm, the statistics and their intervals, of shape (2, number of statistics)
    """
    from rliable.library import get_interval_estimates  # takes seconds

    state = np.random.get_state()
    np.random.seed(0)  # the same report from the same results: rliable draws from the global generator
    try:
        points, intervals = get_interval_estimates(scores, function, reps=n_resamples)
    finally:
        np.random.set_state(state)
    return {name: (points[name], intervals[name]) for name in scores}


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """
    Mean of the middle half of all scores, over all runs and environments.

    :param scores: shape (number of runs, number of environments)
    :return: one number, as a vector
    """
    from rliable.metrics import aggregate_iqm

    return np.array([aggregate_iqm(scores)])


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """
    The share of runs, over all environments, that score above each threshold.

    :param scores: shape (number of runs, number of environments)
    :param thresholds: the thresholds
    :return: a share for each of them
    """
    from rliable.library import score_distributions

    return score_distributions(scores, thresholds)
