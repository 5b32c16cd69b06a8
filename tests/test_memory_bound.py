"""The memory that the theorem asks for and the one that single precision can see, against exact arithmetic."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from benchmarks.tabular import TabularStaQ, bound, convergence, linear_rate, measured_rate
from benchmarks.tabular_mdps import garnet
from sb3_staq.memory_bounds import memory_bound, resolution_bound


def meets_the_condition(memory_size, gamma, kl_coef, ent_coef):
    """The theorem's inequality without logarithms and without rounding: beta^M below the fraction."""
    gamma, kl_coef, ent_coef = map(Fraction, (gamma, kl_coef, ent_coef))
    beta = kl_coef / (kl_coef + ent_coef)
    return beta**memory_size < (1 - gamma) ** 2 * (1 - beta) / (gamma**2 * (3 + beta) + 1 - beta)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9, 0.99, 0.999, 1 - 2**-40])
@pytest.mark.parametrize(("kl_coef", "ent_coef"), [(1e-3, 7.0), (0.5, 1), (1, 1), (0.4, 0.1), (19, 1), (20, 0.03)])
def test_the_smallest_memory_that_meets_the_condition(gamma, kl_coef, ent_coef):
    memory_size = memory_bound(gamma, kl_coef, ent_coef)
    assert meets_the_condition(memory_size, gamma, kl_coef, ent_coef)
    assert memory_size == 1 or not meets_the_condition(memory_size - 1, gamma, kl_coef, ent_coef)


def test_published_settings():
    assert memory_bound(0.99, 19.0, 1.0) == 265  # beta = 0.95
    assert memory_bound(0.99, 0.5, 1.0) == 10  # beta = 1/3: by hand, 3^-10 = 1.6935e-5 is below 1.6948e-5
    assert memory_bound(0.99, 0.0, 0.1) == 1


@pytest.mark.parametrize("ratio", [1e-6, 1e-9, 1e-13, 1e-17, 1e-30])
def test_beta_close_to_1(ratio):
    """Where 1 - beta cancels, and at last beta rounds to 1; against 80 digits."""
    gamma, kl_coef, ent_coef = 0.99, 3.0, 3.0 * ratio
    with localcontext() as context:
        context.prec = 80
        g, kl, ent = map(Decimal, (gamma, kl_coef, ent_coef))
        beta = kl / (kl + ent)
        exact = ((1 - g) ** 2 * (1 - beta) / (g**2 * (3 + beta) + 1 - beta)).ln() / beta.ln()
        resolution = Decimal(2).ln() * -24 / beta.ln()
    # Double precision holds no single units in numbers as large as these
    assert memory_bound(gamma, kl_coef, ent_coef) == pytest.approx(float(exact), rel=1e-13, abs=1)
    assert resolution_bound(kl_coef, ent_coef) == pytest.approx(float(resolution), rel=1e-13, abs=1)


def test_the_bound_does_not_depend_on_units():
    assert memory_bound(0.99, 19e200, 1e200) == memory_bound(0.99, 19e-200, 1e-200) == 265


@pytest.mark.parametrize("kl_coef", [0.0, 1e-320, 0.1, 1e9])
def test_without_a_future_one_q_function_is_enough(kl_coef):
    assert memory_bound(0.0, kl_coef, 1.0) == 1


@pytest.mark.parametrize(("kl_coef", "ent_coef"), [(1, 99), (0.5, 1), (1, 1), (3, 1), (0.4, 0.1), (19, 1), (300, 1)])
def test_single_precision_sees_no_more_than_the_resolution_bound(kl_coef, ent_coef):
    """Older Q-functions, all together, change nothing in the sum of the weights; one fewer is seen."""
    n = resolution_bound(kl_coef, ent_coef)
    beta = kl_coef / (kl_coef + ent_coef)
    total = 1 / (1 - beta)

    def is_seen(memory_size):
        older = math.fsum(beta**age for age in range(memory_size, memory_size + 20_000)) / total
        return np.float32(1) + np.float32(older) != np.float32(1)

    assert not is_seen(n)
    assert is_seen(n - 1)


def test_resolution_without_kl():
    assert resolution_bound(0.0, 0.1) == 1


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"gamma": 1.0}, "gamma=1.0"),
        ({"gamma": -0.1}, "gamma=-0.1"),
        ({"gamma": math.nan}, "gamma=nan"),
        ({"kl_coef": -1.0}, "kl_coef=-1.0"),
        ({"kl_coef": math.inf}, "kl_coef=inf"),
        ({"ent_coef": 0.0}, "ent_coef=0.0"),
        ({"ent_coef": 1e-310}, "ent_coef=1e-310"),
        ({"ent_coef": math.nan}, "ent_coef=nan"),
        ({"kl_coef": 0.0, "ent_coef": 0.0}, "ent_coef=0.0"),
    ],
)
def test_errors_name_the_argument(arguments, name):
    arguments = {"gamma": 0.9, "kl_coef": 1.0, "ent_coef": 0.1} | arguments
    with pytest.raises(ValueError, match=f"Invalid {name}: expected"):
        memory_bound(**arguments)
    if "gamma" not in name:
        with pytest.raises(ValueError, match=f"Invalid {name}: expected"):
            resolution_bound(arguments["kl_coef"], arguments["ent_coef"])


@pytest.mark.parametrize(("gamma", "kl_coef", "ent_coef"), [(0.9, 0.4, 0.1), (0.9, 0.1, 0.2), (0.97, 0.3, 0.1)])
def test_the_corrected_rule_converges_linearly_with_that_memory(gamma, kl_coef, ent_coef):
    """Below the proven line at every update, and with a fitted rate of at most d, on each of eight random MDPs."""
    mdp = garnet(range(20, 28), n_states=10, n_actions=3, branching=3, gamma=gamma)
    memory_size, n_iterations = memory_bound(gamma, kl_coef, ent_coef), 150
    d = linear_rate(kl_coef, ent_coef, gamma)
    limit = bound(mdp, kl_coef, ent_coef, n_iterations)
    distances = {
        rule: convergence(TabularStaQ(mdp, rule, memory_size, kl_coef, ent_coef), n_iterations)
        for rule in ("weight_corrected", "truncated")
    }
    for quantity, factor in zip(distances["weight_corrected"], (gamma, 1.0), strict=True):
        assert (quantity <= factor * limit + 1e-13).all()
        for run in quantity.T:
            assert measured_rate(run) <= d
    # The yardstick can tell: the truncated rule with as much memory stops short of the optimum
    assert np.isnan([measured_rate(run) for run in distances["truncated"][1].T]).all()
