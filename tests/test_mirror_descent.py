"""The mathematics against sums written out from the definitions, numerical optimisation and enumeration."""

import itertools
import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch as th
from scipy.optimize import minimize

from sb3_staq.memory_bounds import auto_memory_size
from sb3_staq.mirror_descent import (
    LOGIT_RULES,
    PolicyUpdate,
    StackWeights,
    decay_rate,
    entropy,
    expected_value,
    kl_divergence,
    log_policy,
    logit_scale,
    make_logit_rule,
    max_entropy,
    soft_value,
    step_size,
)


def written_out_logits(rule, memory_size, coefs, q_values):
    """
    ``xi_k`` from the definition: the current factor times, for each kept Q-function, the product of the betas that were
    in force since its push.

    :param coefs: (kl_coef, ent_coef) of each policy update so far
    :param q_values: the Q-function of each policy update so far
    """
    kl, ent = coefs[-1]
    factor = 1 / (kl + ent)
    if rule == "weight_corrected":
        factor /= 1 - (kl / (kl + ent)) ** memory_size
    first = 0 if rule == "exact" else max(0, len(q_values) - memory_size)
    xi = np.zeros_like(q_values[0])
    for i in range(first, len(q_values)):
        weight = 1.0
        for later_kl, later_ent in coefs[i + 1 :]:
            weight *= later_kl / (later_kl + later_ent)
        xi = xi + factor * weight * q_values[i]
    return xi


def coefficients(kind, n, rng):
    """(kl_coef, ent_coef) for n policy updates."""
    if kind == "fixed":
        return [(2.0, 0.5)] * n
    if kind == "annealed":
        return [(20.0, 2.0 - 1.6 * min(1.0, i / 10)) for i in range(n)]
    return [(float(rng.uniform(0.0, 5.0)), float(rng.uniform(0.05, 3.0))) for _ in range(n)]


@pytest.mark.parametrize("kind", ["fixed", "annealed", "random"])
@pytest.mark.parametrize("memory_size", [1, 2, 5, 9])
@pytest.mark.parametrize("rule", LOGIT_RULES)
def test_rules_equal_the_sum_written_out(rule, memory_size, kind):
    """After every update, below, at and above M: both the weights and the recursion give the definition's logits."""
    rng = np.random.default_rng(memory_size)
    n_updates = 3 * memory_size + 2
    coefs = coefficients(kind, n_updates, rng)
    q_values = [rng.normal(size=(4, 3)) for _ in range(n_updates)]
    weights = StackWeights(rule, memory_size)
    kept: list[th.Tensor] = []
    total = th.zeros(4, 3, dtype=th.float64)
    for k, (kl, ent) in enumerate(coefs, start=1):
        q_new = th.as_tensor(q_values[k - 1])
        was_full = rule != "exact" and len(kept) == memory_size
        assert weights.full == was_full
        update = weights.push(kl, ent)
        deleted = [kept.pop(0)] if was_full else []
        kept.append(q_new)
        assert len(update.deleted_weights) == was_full
        assert len(weights) == len(kept) == (k if rule == "exact" else min(k, memory_size))
        total = update.apply(total, q_new, deleted)

        expected = written_out_logits(rule, memory_size, coefs[:k], q_values[:k])
        summed = sum(weight * q for weight, q in zip(weights.values, kept, strict=True))
        np.testing.assert_allclose(weights.scale * total.numpy(), expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(weights.scale * summed.numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("memory_size", [1, 2, 5, 300])
@pytest.mark.parametrize(("kl", "ent"), [(1.0, 0.05), (20.0, 0.4), (0.3, 2.0), (0.0, 1.0), (1e6, 1e-3)])
def test_sum_of_weights(memory_size, kl, ent):
    """1/ent_coef for the corrected rule with a full stack, (1 - beta^M)/ent_coef for plain truncation."""
    for rule, expected in [
        ("weight_corrected", 1 / ent),
        ("truncated", -math.expm1(-memory_size * math.log1p(ent / kl)) / ent if kl > 0 else 1 / ent),
    ]:
        weights = StackWeights(rule, memory_size)
        for _ in range(2 * memory_size):
            weights.push(kl, ent)
        assert len(weights) == memory_size
        assert weights.scale * sum(weights.values) == pytest.approx(expected, rel=1e-9)


def test_sum_of_weights_of_the_exact_rule_in_the_limit():
    weights = StackWeights("exact", 3)
    sums = []
    for _ in range(400):
        weights.push(2.0, 0.5)
        sums.append(weights.scale * sum(weights.values))
    assert len(weights) == 400  # whatever the memory size
    assert sums[9] == pytest.approx((1 - 0.8**10) / 0.5, rel=1e-12)
    assert sums[-1] == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("memory_size", [1, 2, 5])
@pytest.mark.parametrize(("kl", "ent"), [(2.0, 0.5), (20.0, 0.4), (0.1, 1.0)])
def test_two_published_forms_of_the_corrected_recursion(memory_size, kl, ent):
    """Both recursions on xi itself give the logits of the rule, with missing Q-functions counted as zero."""
    rng = np.random.default_rng(0)
    alpha, beta = 1 / (kl + ent), kl / (kl + ent)
    c = alpha / (1 - beta**memory_size)
    q_values = [rng.normal(size=3) for _ in range(4 * memory_size + 1)]
    weights = StackWeights("weight_corrected", memory_size)
    kept: list[np.ndarray] = []
    first_form, second_form = np.zeros(3), np.zeros(3)
    for k, q_new in enumerate(q_values):
        q_old = q_values[k - memory_size] if k >= memory_size else np.zeros(3)
        first_form = beta * first_form + c * (q_new - beta**memory_size * q_old)
        ratio = beta**memory_size / (1 - beta**memory_size)
        second_form = beta * second_form + alpha * q_new + alpha * ratio * (q_new - q_old)

        weights.push(kl, ent)
        kept = [*kept, q_new][-memory_size:]
        logits = weights.scale * sum(w * q for w, q in zip(weights.values, kept, strict=True))
        np.testing.assert_allclose(logits, first_form, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(logits, second_form, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("memory_size", [1, 10, 300])
@pytest.mark.parametrize(
    ("kl", "ent"), [(1.0, 1e-3), (1e6, 1e-6), (1e8, 1e-10), (1e12, 1e-12), (1.0, 1e6), (1e-9, 1.0), (1e-300, 1e10)]
)
def test_scale_without_cancellation(memory_size, kl, ent):
    """``alpha / (1 - beta^M)`` to double precision, also where ``1 - beta**M`` in doubles would be 0 or noise."""
    getcontext().prec = 400
    kl_, ent_ = Decimal(kl), Decimal(ent)
    alpha, beta = 1 / (kl_ + ent_), kl_ / (kl_ + ent_)
    assert step_size(kl, ent) == pytest.approx(float(alpha), rel=1e-14)
    assert decay_rate(kl, ent) == pytest.approx(float(beta), rel=1e-14)
    scale = logit_scale("weight_corrected", kl, ent, memory_size)
    assert scale == pytest.approx(float(alpha / (1 - beta**memory_size)), rel=1e-12)
    assert logit_scale("truncated", kl, ent, memory_size) == pytest.approx(float(alpha), rel=1e-14)
    assert logit_scale("exact", kl, ent, memory_size) == pytest.approx(float(alpha), rel=1e-14)


def test_sum_of_weights_for_beta_close_to_one():
    """beta = 1 - 1e-14: the weights still sum to 1/ent_coef."""
    weights = StackWeights("weight_corrected", 300)
    for _ in range(1000):
        weights.push(1e4, 1e-10)
    assert weights.scale * sum(weights.values) == pytest.approx(1e10, rel=1e-10)


def test_no_entropy_term():
    """ent_coef = 0 is plain mirror descent for the rules that do not divide by it: all weights stay 1/kl_coef."""
    for rule, n in [("truncated", 4), ("exact", 9)]:
        weights = StackWeights(rule, 4)
        for _ in range(9):
            weights.push(2.0, 0.0)
        assert weights.values == [1.0] * n
        assert weights.scale == 0.5


def test_no_kl_term():
    """kl_coef = 0: the policy is the softmax of the newest Q-function over ent_coef, in all rules."""
    for rule in LOGIT_RULES:
        weights = StackWeights(rule, 3)
        for _ in range(5):
            weights.push(0.0, 0.25)
        assert weights.values[-1] * weights.scale == 4.0
        assert sum(weights.values) == 1.0


def test_custom_weights_equal_the_sum_written_out():
    """Also negative ones, ones that are 0, and while the stack is filling; whatever the coefficients are."""
    rng = np.random.default_rng(0)
    by_age = [0.0, -1.5, 2.0, 0.25]
    q_values = [rng.normal(size=(4, 3)) for _ in range(11)]
    weights = StackWeights(by_age, 4)
    assert not weights.recursive
    for k in range(11):
        assert weights.full == (k >= 4)
        update = weights.push(float(rng.uniform(0, 5)), float(rng.uniform(0, 5)))
        assert len(update.deleted_weights) == (k >= 4)
        with pytest.raises(AssertionError, match="recursion"):
            update.apply(th.ones(2), th.ones(2), [th.ones(2)])
        expected = sum(by_age[age] * q_values[k - age] for age in range(4) if age <= k)
        kept = q_values[max(0, k - 3) : k + 1]
        actual = sum(weights.scale * weight * q for weight, q in zip(weights.values, kept, strict=True))
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("memory_size", [1, 2, 6])
def test_geometric_custom_weights_are_the_truncated_rule(memory_size):
    kl, ent = 2.0, 0.5
    custom = StackWeights(lambda age: 0.4 * 0.8**age, memory_size)
    truncated = StackWeights("truncated", memory_size)
    for _ in range(3 * memory_size):
        assert len(custom.push(kl, ent).deleted_weights) == len(truncated.push(kl, ent).deleted_weights)
        actual, expected = (np.multiply(weights.scale, weights.values) for weights in (custom, truncated))
        np.testing.assert_allclose(actual, expected, rtol=1e-14)


def test_custom_weights_are_evaluated_once():
    ages = []

    def weight(age):
        ages.append(age)
        return 1.0 / (1 + age)

    assert make_logit_rule(weight, 3) == (1.0, 1 / 2, 1 / 3)
    weights = StackWeights(weight, 3)
    for _ in range(5):
        weights.push(1.0, 1.0)
    assert ages == [0, 1, 2] * 2
    for same in ([1, 0.5, 0], (1, 0.5, 0.0), np.array([1, 0.5, 0], np.float32)):
        assert make_logit_rule(same, 3) == (1.0, 0.5, 0.0)


def test_float32_recursion_stays_close_to_the_sum():
    """Rounding errors are damped by beta: after thousands of updates the recursion is still at the direct sum."""
    rng = np.random.default_rng(0)
    memory_size = 50
    weights = StackWeights("weight_corrected", memory_size)
    kept: list[th.Tensor] = []
    total = th.zeros(64, 4)
    for _ in range(5000):
        q_new = th.as_tensor(100 + 10 * rng.normal(size=(64, 4)), dtype=th.float32)
        update = weights.push(20.0, 0.4)
        deleted = [kept.pop(0) for _ in update.deleted_weights]
        kept.append(q_new)
        total = update.apply(total, q_new, deleted)
    direct = sum(weight * q.double() for weight, q in zip(weights.values, kept, strict=True))
    assert ((total - direct).abs().max() / direct.abs().max()).item() < 1e-5


def test_update_that_deletes_needs_the_deleted_values():
    update = PolicyUpdate(decay=0.5, deleted_weights=(0.25,))
    with pytest.raises(ValueError, match="shorter"):
        update.apply(th.ones(2), th.ones(2))
    np.testing.assert_allclose(update.apply(th.ones(2), th.full((2,), 3.0), [th.full((2,), 4.0)]), [2.5, 2.5])


@pytest.mark.parametrize("rule", LOGIT_RULES)
@pytest.mark.parametrize(("old_size", "new_size"), [(6, 2), (6, 1), (6, 5), (3, 7)])
def test_memory_that_changes_its_size(rule, old_size, new_size):
    """What a smaller memory has no room for is deleted at the next push; the recursion follows, and goes on."""
    rng = np.random.default_rng(1)
    weights, kept, total, coefs, q_values = StackWeights(rule, old_size), [], th.zeros(3, dtype=th.float64), [], []
    for k in range(20):
        if k == 9:
            weights.memory_size = new_size
        kl, ent = float(rng.uniform(0.5, 3)), float(rng.uniform(0.1, 1))
        coefs.append((kl, ent))
        q_values.append(rng.normal(size=3))
        n_before = len(kept)
        n_deleted = weights.n_deleted
        update = weights.push(kl, ent)
        deleted = [kept.pop(0) for _ in update.deleted_weights]
        kept.append(th.as_tensor(q_values[-1]))
        total = update.apply(total, kept[-1], deleted)
        assert len(deleted) == n_deleted == n_before + 1 - len(kept)
        assert len(kept) == len(weights) == (k + 1 if rule == "exact" else min(n_before + 1, weights.memory_size))
        summed = sum(weight * q for weight, q in zip(weights.values, kept, strict=True))
        np.testing.assert_allclose(total, summed, rtol=1e-10, atol=1e-12)
    if rule == "exact" or new_size < old_size:  # a larger memory still lacks what was deleted before
        expected = written_out_logits(rule, new_size, coefs, q_values)
        np.testing.assert_allclose(weights.scale * total, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize(("kl", "ent"), [(1.0, 2.5), (1.0, 0.1), (20.0, 0.4), (1.0, 1.0), (0.1, 10.0)])
def test_automatic_memory_size(gamma, kl, ent):
    """The least M above the theorem's bound in decimal arithmetic, but no more than 2^-24 is resolved by floats."""
    getcontext().prec = 50
    beta, g = Decimal(kl) / (Decimal(kl) + Decimal(ent)), Decimal(gamma)
    bound = ((1 - g) ** 2 * (1 - beta) / (g**2 * (3 + beta) + 1 - beta)).ln() / beta.ln()
    resolved = (Decimal(2) ** -24).ln() / beta.ln()
    expected = min(math.floor(bound) + 1, math.ceil(resolved))
    assert auto_memory_size(gamma, kl, ent) == max(1, expected)


def test_automatic_memory_size_of_extreme_coefficients():
    """No cancellation and no overflow."""
    assert auto_memory_size(0.99, 20.0, 20.0 / 19) == 265  # beta = 0.95
    assert auto_memory_size(0.99, 1.0, 2.0) == 10  # beta = 1/3: the bound is 9.9989
    assert auto_memory_size(0.99, 0.0, 1.0) == auto_memory_size(1.0, 0.0, 1.0) == 1
    assert auto_memory_size(0.99, 1e30, 1.0) == pytest.approx(24 * math.log(2) * 1e30, rel=1e-9)
    assert auto_memory_size(0.99, 1e-300, 1e300) == 1
    assert auto_memory_size(1.0, 1.0, 1.0) == 24
    for kl, ent in ((1.0, 0.0), (0.0, 0.0), (1e300, 1e-300)):
        with pytest.raises(ValueError, match=r"Invalid ent_coef=.*memory_size='auto' has no bound"):
            auto_memory_size(0.99, kl, ent)


# The closed form is the solution of the policy update's optimisation problem


def numerical_argmax(objective, size):
    """The maximiser of a concave function over the simplex, by a general-purpose optimiser."""

    def softmax(z):
        z = np.exp(z - z.max())
        return z / z.sum()

    best = minimize(lambda z: -objective(softmax(z)), np.zeros(size), method="BFGS", options={"gtol": 1e-9})
    return softmax(best.x)


@pytest.mark.parametrize("seed", range(5))
def test_closed_form_solves_the_policy_update(seed):
    """With constant coefficients, softmax(xi_{k+1}) maximises E[Q_k] - ent_coef * h(p) - kl_coef * KL(p || pi_k)."""
    rng = np.random.default_rng(seed)
    n_actions = int(rng.integers(2, 6))
    kl, ent = float(rng.uniform(0.1, 3)), float(rng.uniform(0.1, 1))
    weights = StackWeights("exact", 1)
    total = th.zeros(n_actions, dtype=th.float64)
    for _ in range(4):
        pi = th.softmax(weights.scale * total, dim=-1).numpy()
        q = rng.normal(size=n_actions)
        total = weights.push(kl, ent).apply(total, th.as_tensor(q))
        new_pi = log_policy(weights.scale * total, (n_actions,)).exp().numpy()

        def objective(p, q=q, pi=pi):
            return p @ q - ent * (p @ np.log(p)) - kl * (p @ (np.log(p) - np.log(pi)))

        np.testing.assert_allclose(numerical_argmax(objective, n_actions), new_pi, atol=1e-5)
        for _ in range(100):  # nothing near is better
            other = new_pi * np.exp(0.01 * rng.normal(size=n_actions))
            assert objective(other / other.sum()) <= objective(new_pi) + 1e-12


def test_changing_coefficients_put_the_old_policy_at_the_new_temperature():
    """Then the KL divergence in the problem that is solved is from softmax(scale_{k+1} * S_k), not from pi_k."""
    rng = np.random.default_rng(5)
    weights = StackWeights("exact", 1)
    total, distances = th.zeros(4, dtype=th.float64), []
    for kl, ent in [(2.0, 1.0), (2.0, 0.5), (0.7, 0.3), (0.5, 1.0)]:
        pi, old_total = th.softmax(weights.scale * total, dim=-1).numpy(), total
        q = rng.normal(size=4)
        total = weights.push(kl, ent).apply(total, th.as_tensor(q))
        old_pi = th.softmax(weights.scale * old_total, dim=-1).numpy()
        distances.append(abs(old_pi - pi).max())

        def objective(p, q=q, pi=old_pi, kl=kl, ent=ent):
            return p @ q - ent * (p @ np.log(p)) - kl * (p @ (np.log(p) - np.log(pi)))

        new_pi = th.softmax(weights.scale * total, dim=-1).numpy()
        np.testing.assert_allclose(numerical_argmax(objective, 4), new_pi, atol=1e-5)
    assert distances[0] == 0 and min(distances[1:]) > 0.01


def test_corrected_rule_is_a_policy_update_with_a_corrected_critic():
    """With a full stack, xi_{k+1} maximises the objective of ``Q_k + beta^M/(1-beta^M) (Q_k - Q_{k-M})``."""
    rng = np.random.default_rng(3)
    kl, ent, memory_size, n_actions = 1.0, 0.4, 3, 4
    beta = kl / (kl + ent)
    weights = StackWeights("weight_corrected", memory_size)
    kept: list[th.Tensor] = []
    total = th.zeros(n_actions, dtype=th.float64)
    for k in range(8):
        pi = th.softmax(weights.scale * total, dim=-1).numpy()
        q_new = th.as_tensor(rng.normal(size=n_actions))
        update = weights.push(kl, ent)
        q_old = kept.pop(0) if update.deleted_weights else th.zeros(n_actions)
        kept.append(q_new)
        total = update.apply(total, q_new, [q_old] * len(update.deleted_weights))
        q = (q_new + beta**memory_size / (1 - beta**memory_size) * (q_new - q_old)).numpy()

        def objective(p, q=q, pi=pi):
            return p @ q - ent * (p @ np.log(p)) - kl * (p @ (np.log(p) - np.log(pi)))

        new_pi = th.softmax(weights.scale * total, dim=-1).numpy()
        np.testing.assert_allclose(numerical_argmax(objective, n_actions), new_pi, atol=1e-5, err_msg=f"update {k}")


def test_closed_form_for_product_policies():
    """For an additive critic, the best of *all* joint distributions is the product of the branches' softmaxes."""
    rng = np.random.default_rng(0)
    sizes, kl, ent = (2, 3), 0.7, 0.3
    joint = list(itertools.product(range(2), range(3)))
    old = log_policy(th.as_tensor(rng.normal(size=5)), sizes).numpy()
    q = rng.normal(size=5)
    joint_q = np.array([q[i] + q[2 + j] for i, j in joint])
    joint_log_old = np.array([old[i] + old[2 + j] for i, j in joint])

    def objective(p):
        return p @ joint_q - ent * (p @ np.log(p)) - kl * (p @ (np.log(p) - joint_log_old))

    new = log_policy(th.as_tensor(decay_rate(kl, ent) * old + step_size(kl, ent) * q), sizes).exp().numpy()
    joint_new = np.array([new[i] * new[2 + j] for i, j in joint])
    np.testing.assert_allclose(numerical_argmax(objective, 6), joint_new, atol=1e-5)


# Entropy, KL divergence and soft values against enumeration of the joint actions


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (3, 1, 2), (2, 2, 2, 2), (1,)])
def test_sums_over_branches_equal_enumeration(sizes):
    """Everything that is summed over bins equals the sum over all joint actions of the product policy."""
    rng = np.random.default_rng(len(sizes))
    n = sum(sizes)
    offsets = np.cumsum([0, *sizes[:-1]])
    logits, other_logits = 2 * rng.normal(size=(2, 7, n))
    q = rng.normal(size=(7, n))
    log_pi = log_policy(th.as_tensor(logits), sizes)
    log_other = log_policy(th.as_tensor(other_logits), sizes)
    for row in range(7):
        expected_entropy = expected_kl = expected_q = total = 0.0
        for bins in itertools.product(*map(range, sizes)):
            p = p_other = 1.0
            value = 0.0
            for offset, size, c in zip(offsets, sizes, bins, strict=True):
                branch, other = (np.exp(x[row, offset : offset + size]) for x in (logits, other_logits))
                p *= branch[c] / branch.sum()
                p_other *= other[c] / other.sum()
                value += q[row, offset + c]
            total += p
            expected_entropy -= p * math.log(p)
            expected_kl += p * math.log(p / p_other)
            expected_q += p * value
        assert total == pytest.approx(1.0)
        assert entropy(log_pi)[row].item() == pytest.approx(expected_entropy, abs=1e-12)
        assert kl_divergence(log_pi, log_other)[row].item() == pytest.approx(expected_kl, abs=1e-12)
        soft = soft_value(log_pi, expected_value(log_pi, th.as_tensor(q)), 0.3)[row].item()
        assert soft == pytest.approx(expected_q + 0.3 * expected_entropy, abs=1e-12)
    uniform = log_policy(th.zeros(n, dtype=th.float64), sizes)
    assert entropy(uniform).item() == pytest.approx(max_entropy(sizes), abs=1e-12)
    assert max_entropy(sizes) == pytest.approx(math.log(np.prod(sizes)))


def test_leading_shape_is_arbitrary():
    logits = th.randn(2, 5, 3, 5, generator=th.Generator().manual_seed(0))
    log_pi = log_policy(logits, (2, 3))
    assert log_pi.shape == logits.shape
    assert entropy(log_pi).shape == soft_value(log_pi, expected_value(log_pi, logits), 1.0).shape == (2, 5, 3)
    th.testing.assert_close(log_pi[1, 4, 2], log_policy(logits[1, 4, 2], (2, 3)))


def test_extreme_logits_stay_finite():
    """A nearly deterministic policy has entropy 0 and a finite soft value, not NaN."""
    log_pi = log_policy(th.tensor([[1e6, 0.0, -1e6], [0.0, 1e4, 1e4]]), (3,))
    assert th.isfinite(log_pi).all()
    np.testing.assert_allclose(entropy(log_pi), [0.0, math.log(2)], atol=1e-6)
    values = soft_value(log_pi, expected_value(log_pi, th.tensor([[1.0, 2.0, 3.0]] * 2)), 0.5)
    np.testing.assert_allclose(values, [1.0, 2.5 + 0.5 * math.log(2)], rtol=1e-6)


# Policy iteration on a small Markov decision process, with exact policy evaluation


class RandomMDP:
    """Tabular soft policy evaluation (a linear solve) and soft value iteration (the independent solution)."""

    def __init__(self, n_states=5, n_actions=3, gamma=0.9, ent_coef=0.2, seed=0):
        rng = np.random.default_rng(seed)
        self.gamma, self.ent_coef = gamma, ent_coef
        self.reward = rng.normal(size=(n_states, n_actions))
        self.transition = rng.dirichlet(0.5 * np.ones(n_states), size=(n_states, n_actions))

    def evaluate(self, pi):
        """The soft Q-function of a policy."""
        n_states = len(pi)
        entropies = -(pi * np.log(np.maximum(pi, 1e-300))).sum(axis=1)
        v_transition = np.einsum("sa,sat->st", pi, self.transition)
        v_reward = (pi * self.reward).sum(axis=1) + self.ent_coef * entropies
        v = np.linalg.solve(np.eye(n_states) - self.gamma * v_transition, v_reward)
        return self.reward + self.gamma * self.transition @ v

    def optimal_q_values(self):
        q = np.zeros_like(self.reward)
        for _ in range(2000):
            v = self.ent_coef * np.log(np.exp(q / self.ent_coef).sum(axis=1))
            q = self.reward + self.gamma * self.transition @ v
        return q

    def mirror_descent(self, rule, memory_size, kl_coef, n_updates):
        """max |Q_k - Q*| of each iteration, and max |log pi - log pi*| of the last policy."""
        optimum = self.optimal_q_values()
        weights = StackWeights(rule, memory_size)
        kept, errors = [], []
        total = th.zeros(self.reward.shape, dtype=th.float64)
        for _ in range(n_updates):
            q = self.evaluate(th.softmax(weights.scale * total, dim=-1).numpy())
            errors.append(np.abs(q - optimum).max())
            update = weights.push(kl_coef, self.ent_coef)
            deleted = [kept.pop(0) for _ in update.deleted_weights]
            kept.append(th.as_tensor(q))
            total = update.apply(total, kept[-1], deleted)
        log_optimum = th.log_softmax(th.as_tensor(optimum) / self.ent_coef, dim=-1)
        log_pi = th.log_softmax(weights.scale * total, dim=-1)
        return np.array(errors), (log_pi - log_optimum).abs().max().item()


@pytest.mark.parametrize("seed", range(3))
def test_exact_rule_converges_to_the_regularised_optimum(seed):
    """Linearly, at least at the rate d = beta + gamma (1 - beta)."""
    errors, policy_error = RandomMDP(seed=seed).mirror_descent("exact", 1, kl_coef=0.3, n_updates=500)
    rate = 0.6 + 0.9 * 0.4
    assert errors[0] > 0.1
    assert (errors <= 10 * errors[0] * rate ** np.arange(500) + 1e-10).all()
    assert errors[-1] < 1e-7
    assert policy_error < 1e-6


def test_corrected_rule_has_no_error_floor_but_truncation_has():
    """Deleting old Q-functions costs nothing in the limit with corrected weights; order beta^M in the logits if not."""
    mdp = RandomMDP(seed=1)
    floors = {}
    for memory_size in (6, 12):
        errors, policy_error = mdp.mirror_descent("weight_corrected", memory_size, kl_coef=0.3, n_updates=500)
        assert errors[-1] < 1e-7
        assert policy_error < 1e-6
        floors[memory_size] = mdp.mirror_descent("truncated", memory_size, kl_coef=0.3, n_updates=500)[1]
        # The fixed point of the truncated rule has its own, larger temperature: ent_coef / (1 - beta^M)
        assert mdp.mirror_descent("truncated", memory_size, kl_coef=0.3, n_updates=800)[1] == pytest.approx(
            floors[memory_size], rel=1e-6
        )
    assert floors[12] > 1e-3
    assert floors[12] / floors[6] == pytest.approx(0.6**6, rel=0.1)


def test_kl_divergence_is_not_negative():
    """Not even by rounding, where the policies hardly differ."""
    logits, change = th.randn(2, 1000, 5, generator=th.Generator().manual_seed(0))
    close = log_policy(logits, (5,)), log_policy(logits + 1e-4 * change, (5,))
    assert kl_divergence(*close).min() >= 0
