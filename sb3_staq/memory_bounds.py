"""How many Q-functions the policy needs: by the paper's theorem, and by the resolution of single precision."""

import math


def auto_memory_size(gamma: float, kl_coef: float, ent_coef: float) -> int:
    """
    Compute the memory that the paper's theorem asks for, but no more than single precision can resolve.

    :return: number of Q-functions
    :raise ValueError: if ``ent_coef`` is 0: no Q-function would ever fade
    """
    bound = resolution_bound(kl_coef, ent_coef)
    return bound if gamma == 1 else min(bound, memory_bound(gamma, kl_coef, ent_coef))


def memory_bound(gamma: float, kl_coef: float, ent_coef: float) -> int:
    """
    Compute the smallest memory for which the paper guarantees that "weight_corrected" converges linearly.

    The least integer ``M > log[(1-gamma)^2 (1-beta) / (gamma^2 (3+beta) + 1 - beta)] / log(beta)``, the condition of
    the theorem in https://arxiv.org/abs/2506.13862v1: 265 for beta 0.95 and gamma 0.99. The fraction is at most 1, so
    the bound is at least 1. It is 1 if ``gamma`` is 0, because the first evaluation is then final, and if ``kl_coef``
    is 0, because only the newest Q-function then has a weight.

    :param gamma: discount factor, in [0, 1); with 1 no finite memory meets the condition
    :param kl_coef: weight of the KL term, at least 0
    :param ent_coef: weight of the entropy term, above 0
    :return: ``M``, in Q-functions
    :raise ValueError: if an argument is outside its range
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"Invalid gamma={gamma}: expected a number in [0, 1); without discount no memory is enough")
    log_beta = _log_decay_rate(kl_coef, ent_coef)
    # From the logarithm, as 1 - beta would cancel for beta close to 1
    one_minus_beta = -math.expm1(log_beta)
    denominator = gamma**2 * (4 - one_minus_beta) + one_minus_beta
    log_fraction = 2 * math.log1p(-gamma) + math.log(one_minus_beta) - math.log(denominator)
    return math.floor(log_fraction / log_beta) + 1


def resolution_bound(kl_coef: float, ent_coef: float) -> int:
    """
    Compute the number of Q-functions beyond which older ones are lost in single precision.

    The least ``M`` with ``beta^M <= 2^-24``. In the sum of the weights ``beta^age``, all Q-functions older than ``M``
    updates have the share ``beta^M``; ``2^-24`` is half the distance from 1 to the next number in single precision.

    :param kl_coef: weight of the KL term, at least 0
    :param ent_coef: weight of the entropy term, above 0
    :return: ``M``, in Q-functions
    :raise ValueError: if an argument is outside its range
    """
    return max(1, math.ceil(-24 * math.log(2) / _log_decay_rate(kl_coef, ent_coef)))


def _log_decay_rate(kl_coef: float, ent_coef: float) -> float:
    """Return ``log(beta)``, below 0, accurate for beta close to 1; minus infinity if ``kl_coef`` is 0."""
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"Invalid kl_coef={kl_coef}: expected a finite number >= 0")
    # With less entropy the bounds would overflow
    if not 0 < ent_coef < math.inf or ent_coef < 1e-300 * kl_coef:
        raise ValueError(
            f"Invalid ent_coef={ent_coef}: expected a finite number > 0 and at least 1e-300 * kl_coef; without entropy "
            "no Q-function ever fades, so memory_size='auto' has no bound and has to be an integer"
        )
    return -math.log1p(ent_coef / kl_coef) if kl_coef > 0 else -math.inf
