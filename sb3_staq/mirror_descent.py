"""Entropy-regularised policy mirror descent (EPMD) over a finite memory of Q-functions: the mathematics of StaQ.

After each policy evaluation ``Q_k`` the policy update

    pi_{k+1}(.|s) = argmax_p  E_{a~p}[Q_k(s,a)] - ent_coef * h(p) - kl_coef * KL(p || pi_k(.|s))

(``h``: negative entropy) is solved by ``pi_k = softmax(xi_k)``, ``xi_k = scale_k * S_k`` with the recursion

    S_{k+1} = beta_k * S_k + Q_k - w * Q_{k-M}

where ``w`` is the weight that the deleted Q-function still had. If the coefficients change, ``pi_k`` in the KL
divergence becomes the old policy at the new temperature, ``softmax(scale_{k+1} * S_k)``. The three logit rules differ
only in ``scale_k`` and in whether anything is deleted. Custom weights by age, ``xi_{k+1} = sum_age w(age) Q_{k-age}``,
replace all of this: they follow no recursion, and the sum is evaluated directly. Everything here works on plain tensors
of any leading shape, for the tabular testbed as well as the deep algorithm.

Reference: "StaQ: a Finite Memory Approach to Discrete Action Policy Mirror Descent", https://arxiv.org/abs/2506.13862
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any, NamedTuple

import torch as th

LOGIT_RULES = ("weight_corrected", "truncated", "exact")
LogitRule = str | Sequence[float] | Callable[[int], float]


def make_logit_rule(logit_rule: LogitRule, memory_size: int) -> str | tuple[float, ...]:
    """
    Check a logit rule, and evaluate custom weights.

    :param logit_rule: one of ``LOGIT_RULES``; or custom weights, the factors of the Q-functions in the logits by age,
        newest first: ``memory_size`` numbers, or a callable of the age (0 is the newest), which is evaluated here
    :param memory_size: ``M``, the number of Q-functions kept
    :return: the name of the rule, or the custom weights
    :raise ValueError: if it is neither; custom weights must be finite and not all 0. The message says what is accepted
    """
    expected = (
        f"expected {', '.join(map(repr, LOGIT_RULES))}, or custom weights by age: memory_size={memory_size} finite "
        "numbers, newest first and not all 0, or a callable of the age that gives them"
    )
    weights: list[Any] | None = None
    gives = ""
    if isinstance(logit_rule, str):
        if logit_rule in LOGIT_RULES:
            return logit_rule
    elif callable(logit_rule):
        try:
            weights = [logit_rule(age) for age in range(memory_size)]
        except Exception as error:
            raise ValueError(f"Invalid logit_rule={logit_rule!r}: it failed with {error!r}; {expected}") from error
        gives = f"it gives {weights}; "
    elif isinstance(logit_rule, Iterable) and not isinstance(logit_rule, (Mapping, Set)):
        weights = list(logit_rule)
    if (
        weights is None
        or len(weights) != memory_size
        or not all(isinstance(w, Real) and not isinstance(w, bool) and math.isfinite(w) for w in weights)
        or not any(weights)
    ):
        raise ValueError(f"Invalid logit_rule={logit_rule!r}: {gives}{expected}")
    return tuple(map(float, weights))


def step_size(kl_coef: float, ent_coef: float) -> float:
    """Return ``alpha = 1 / (kl_coef + ent_coef)``, the weight of the newest Q-function in an untruncated sum."""
    return 1.0 / (kl_coef + ent_coef)


def decay_rate(kl_coef: float, ent_coef: float) -> float:
    """Return ``beta = kl_coef / (kl_coef + ent_coef)``, the factor by which one update shrinks all older weights."""
    return kl_coef / (kl_coef + ent_coef)


def logit_scale(logit_rule: str, kl_coef: float, ent_coef: float, memory_size: int) -> float:
    """
    Return the factor that turns the weighted sum of Q-functions ``S`` into the logits ``xi``.

    ``alpha`` for "truncated" and "exact"; ``alpha / (1 - beta^M)`` for "weight_corrected", so that with a full stack
    and constant coefficients the weights sum to ``1 / ent_coef``, as in exact EPMD.

    :param logit_rule: one of ``LOGIT_RULES``
    :param kl_coef: weight of the KL term (eta in the literature)
    :param ent_coef: weight of the entropy term (tau in the literature), above 0 for "weight_corrected"
    :param memory_size: ``M``, the number of Q-functions kept
    """
    alpha = step_size(kl_coef, ent_coef)
    if logit_rule != "weight_corrected" or kl_coef == 0:
        return alpha
    # 1 - beta^M without cancellation when beta is close to 1
    return alpha / -math.expm1(-memory_size * math.log1p(ent_coef / kl_coef))


class PolicyUpdate(NamedTuple):
    """
    The change of the weighted sum: ``S <- decay * S + Q_new - sum_i w_i * Q_i``, over the deleted Q-functions.

    The numbers are NaN for custom weights, which follow no such recursion.
    """

    decay: float
    # The weights of the deleted Q-functions, oldest first: one for a full stack, more if its size was reduced
    deleted_weights: tuple[float, ...] = ()

    def apply(self, total: th.Tensor, q_new: th.Tensor, q_deleted: Sequence[th.Tensor] = ()) -> th.Tensor:
        """
        Do one step of the recursion, from ``S_k`` to ``S_{k+1}``.

        :param total: the weighted sum ``S_k``, any shape; the others have the same
        :param q_new: ``Q_k``
        :param q_deleted: the deleted Q-functions, oldest first
        """
        assert not math.isnan(self.decay), "custom weights follow no recursion: evaluate the sum"
        total = self.decay * total + q_new
        for weight, values in zip(self.deleted_weights, q_deleted, strict=True):
            total = total - weight * values
        return total


class StackWeights:
    """
    The EPMD weights of the stacked Q-functions, oldest first, and the scale of their sum.

    A Q-function enters with weight 1 and shrinks by the ``beta`` of each later update, so a weight is the product of
    the betas since its push; custom weights depend only on the age. The weights, M numbers, are kept in double
    precision on the host.

    :param logit_rule: one of ``LOGIT_RULES``, or custom weights by age, see :func:`make_logit_rule`
    :param memory_size: ``M``, the number of Q-functions kept ("exact" keeps all)
    """

    def __init__(self, logit_rule: LogitRule, memory_size: int):
        self.logit_rule = make_logit_rule(logit_rule, memory_size)
        self.memory_size = memory_size
        self.values: list[float] = []
        self.scale = 0.0
        self.ent_coef: float | None = None  # of the last push

    def __len__(self) -> int:
        return len(self.values)

    @property
    def total(self) -> float:
        """The sum of the weights."""
        return sum(self.values)

    @property
    def recursive(self) -> bool:
        """Whether the weighted sum follows the recursion; custom weights change as a whole at every push."""
        return isinstance(self.logit_rule, str)

    @property
    def full(self) -> bool:
        """Whether the next push deletes the oldest Q-function."""
        return self.n_deleted > 0

    @property
    def n_deleted(self) -> int:
        """How many of the oldest Q-functions the next push deletes."""
        return 0 if self.logit_rule == "exact" else max(0, len(self) + 1 - self.memory_size)

    def push(self, kl_coef: float, ent_coef: float) -> PolicyUpdate:
        """Update the weights for one more Q-function, and return the change of the weighted sum."""
        n_deleted = self.n_deleted
        self.ent_coef = ent_coef
        if not isinstance(self.logit_rule, str):
            n_kept = min(len(self) + 1, self.memory_size)
            self.values = list(self.logit_rule[:n_kept][::-1])
            self.scale = 1.0
            return PolicyUpdate(math.nan, (math.nan,) * n_deleted)
        beta = decay_rate(kl_coef, ent_coef)
        decayed = [beta * value for value in self.values]
        self.values = [*decayed[n_deleted:], 1.0]
        self.scale = logit_scale(self.logit_rule, kl_coef, ent_coef, self.memory_size)
        return PolicyUpdate(beta, tuple(decayed[:n_deleted]))


def averaged_updates(n_updates: int, window: float, size: int) -> range:
    """
    Select the policy updates whose Q-functions enter the average over a growing window.

    They are evenly thinned: every ``stride``-th update, where the stride doubles as soon as there would be more than
    ``size``. So an update that is left out is never needed again.

    :param n_updates: number of policy updates so far, counted from 1
    :param window: the share of them that the window covers, in (0, 1]
    :param size: the largest number of Q-functions in the average
    :return: the updates, oldest first; with ``size`` of at least 2 there are at least ``size // 2`` once the window
        covers as many
    """
    covered = max(1, round(window * n_updates))
    stride = 1
    while covered > stride * size:
        stride *= 2
    last = n_updates - n_updates % stride
    return range(last, n_updates - covered, -stride)[::-1]


def _in_each_branch(
    function: Callable[[th.Tensor], th.Tensor], values: th.Tensor, branch_sizes: Sequence[int]
) -> th.Tensor:
    """Apply a function of the last dimension, which keeps the shape, to each branch: at once if all have one size."""
    if len(set(branch_sizes)) == 1:
        return function(values.unflatten(-1, (-1, branch_sizes[0]))).flatten(-2)
    return th.cat([function(branch) for branch in values.split(list(branch_sizes), dim=-1)], dim=-1)


def log_policy(logits: th.Tensor, branch_sizes: Sequence[int]) -> th.Tensor:
    """Compute the log-probabilities of a product policy, one softmax per branch, from logits of the same shape."""
    return _in_each_branch(lambda branch: branch.log_softmax(dim=-1), logits, branch_sizes)


def centre(values: th.Tensor, branch_sizes: Sequence[int]) -> th.Tensor:
    """Subtract the mean over each branch, which makes no difference to a product policy: same shape."""
    return _in_each_branch(lambda branch: branch - branch.mean(dim=-1, keepdim=True), values, branch_sizes)


def entropy(log_pi: th.Tensor) -> th.Tensor:
    """Compute the entropy in nats, summed over the branches: shape (..., sum(branch_sizes)) -> (...)."""
    return -(log_pi.exp() * log_pi).sum(dim=-1)


def max_entropy(branch_sizes: Sequence[int]) -> float:
    """Return the entropy in nats of the uniform policy; dividing by it normalises an entropy to [0, 1]."""
    return sum(math.log(size) for size in branch_sizes)


def kl_divergence(log_pi: th.Tensor, log_other: th.Tensor) -> th.Tensor:
    """Compute ``KL(pi || other)`` in nats, summed over the branches: shape (..., sum(branch_sizes)) -> (...)."""
    return (log_pi.exp() * (log_pi - log_other)).sum(dim=-1).clamp(min=0)  # rounding may go below 0


def expected_value(log_pi: th.Tensor, q_values: th.Tensor) -> th.Tensor:
    """
    Compute ``E_{a~pi}[Q(s,a)]`` exactly, as a sum over all bins.

    :param log_pi: log-probabilities, shape (..., sum(branch_sizes))
    :param q_values: (additive) Q-values of the bins, same shape
    :return: shape (...)
    """
    return (log_pi.exp() * q_values).sum(dim=-1)


def soft_value(log_pi: th.Tensor, expected_q: th.Tensor, ent_coef: float) -> th.Tensor:
    """Compute ``V(s) = E_{a~pi}[Q(s,a)] + ent_coef * H(pi(.|s))``, shape (...), see :func:`expected_value`."""
    return expected_q + ent_coef * entropy(log_pi)


def solve_ent_coef(
    q_values: th.Tensor, branch_sizes: Sequence[int], target_entropy: float, lowest: float, highest: float
) -> float:
    """
    Find the ``ent_coef`` for which ``softmax(q_values / ent_coef)`` has the target entropy on average.

    The entropy grows with ``ent_coef``, so the root is found by bisection on a log scale, to 0.1%.

    :param q_values: values of the bins at some states, shape (batch, sum(branch_sizes))
    :param target_entropy: target for the mean over the states, as a share of the largest entropy, in (0, 1)
    :param lowest: smallest value to return, above 0
    :param highest: largest value to return
    """
    target = target_entropy * max_entropy(branch_sizes)
    while highest > 1.001 * lowest:
        middle = math.sqrt(lowest * highest)
        if entropy(log_policy(q_values / middle, branch_sizes)).mean().item() < target:
            lowest = middle
        else:
            highest = middle
    return math.sqrt(lowest * highest)
