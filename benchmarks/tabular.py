"""
The theory of StaQ on tabular MDPs: ``python -m benchmarks.tabular``.

Policy evaluation is exact here (a linear system), so that what is left is the policy update: the same code of
``sb3_staq.mirror_descent`` that the deep algorithm runs. The reference is the optimal soft Q-function from soft value
iteration. All distances are sup norms relative to that of the optimal soft Q-function.
"""

import argparse
import math
from collections import deque
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch as th
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import markdown_table, save, share_legend
from benchmarks.tabular_mdps import TabularMDP, garnet, grid_world
from sb3_staq.mirror_descent import LogitRule, StackWeights, decay_rate, kl_divergence, log_policy

FOLDER = Path(__file__).parent / "results" / "tabular"
MEMORY_SIZES = (2, 5, 10, 50, 300)
FINITE_RULES = ("weight_corrected", "truncated")
VARIANTS = [("exact", 0)] + [(rule, memory_size) for rule in FINITE_RULES for memory_size in MEMORY_SIZES]
# Double precision ends here: what is smaller counts as converged
RESOLUTION = 1e-12

# Memory sizes are ordered, and so is the palette; its yellow end is too pale for white paper
COLORS = dict(zip(MEMORY_SIZES, sns.color_palette("viridis", len(MEMORY_SIZES) + 1), strict=False))
MARKERS = dict(zip(MEMORY_SIZES, "osD^v", strict=True))


class TabularStaQ:
    """
    Policy mirror descent on a batch of MDPs.

    :param mdp: the MDPs
    :param logit_rule: one of ``LOGIT_RULES``, or custom weights by age
    :param memory_size: ``M``
    :param kl_coef: weight of the KL term
    :param ent_coef: weight of the entropy
    """

    def __init__(self, mdp: TabularMDP, logit_rule: LogitRule, memory_size: int, kl_coef: float, ent_coef: float):
        self.mdp = mdp
        self.kl_coef = kl_coef
        self.ent_coef = ent_coef
        self.weights = StackWeights(logit_rule, memory_size)
        self.stack: deque[th.Tensor] = deque()
        self.total = th.zeros_like(mdp.reward)

    @property
    def log_pi(self) -> th.Tensor:
        """Log-probabilities of the policy, shape (..., states, actions)."""
        return log_policy(self.weights.scale * self.total, (self.mdp.n_actions,))

    @property
    def scaled_logits(self) -> th.Tensor:
        """``ent_coef * xi_k``, which is to become the optimal soft Q-function, shape (..., states, actions)."""
        return self.ent_coef * self.weights.scale * self.total

    @property
    def noise_gain(self) -> float:
        """By what factor the standard deviation of noise in the Q-functions is less in :attr:`scaled_logits`."""
        return self.ent_coef * self.weights.scale * math.hypot(*self.weights.values)

    def evaluate(self) -> th.Tensor:
        """The soft Q-function of the policy, shape (..., states, actions)."""
        return self.mdp.evaluate(self.log_pi, self.ent_coef)

    def update(self, q_values: th.Tensor) -> None:
        """
        :param q_values: ``Q_k``, shape (..., states, actions)
        """
        update = self.weights.push(self.kl_coef, self.ent_coef)
        deleted = self.stack.popleft() if update.deletes else None
        if self.weights.logit_rule != "exact":  # which would keep all of them, and needs none
            self.stack.append(q_values)
        if self.weights.recursive:
            self.total = update.apply(self.total, q_values, deleted)
        else:
            self.total = sum(weight * q for weight, q in zip(self.weights.values, self.stack, strict=True))


def distance(q_values: th.Tensor, optimum: th.Tensor) -> np.ndarray:
    """
    :param q_values: shape (..., states, actions)
    :param optimum: the optimal soft Q-function, same shape
    :return: sup norm of the difference relative to that of the optimum, shape (...)
    """
    norms = [values.abs().amax(dim=(-2, -1)) for values in (q_values - optimum, optimum)]
    return (norms[0] / norms[1]).numpy()


def convergence(staq: TabularStaQ, n_iterations: int) -> np.ndarray:
    """
    :param staq: at its first iteration
    :param n_iterations: number of iterations
    :return: distances of ``Q_k`` and of ``ent_coef * xi_k``, shape (2, number of iterations, ...)
    """
    optimum = staq.mdp.optimal_q_values(staq.ent_coef)
    distances = []
    for _ in range(n_iterations):
        q_values = staq.evaluate()
        distances.append([distance(q_values, optimum), distance(staq.scaled_logits, optimum)])
        staq.update(q_values)
    return np.array(distances).swapaxes(0, 1)


def linear_rate(kl_coef: float, ent_coef: float, gamma: float) -> float:
    """``d = beta + gamma (1 - beta)``, the proven rate of convergence."""
    beta = decay_rate(kl_coef, ent_coef)
    return beta + gamma * (1 - beta)


def bound(mdp: TabularMDP, kl_coef: float, ent_coef: float, n_iterations: int) -> np.ndarray:
    """
    ``C d^k`` for the distance of ``ent_coef * xi_k`` under the exact rule from ``xi_0 = 0``; ``gamma`` times as much
    for that of ``Q_k``.

    With ``e_k = |Q* - ent_coef xi_k|`` and ``D = |Q_0|``, the policy improves at every iteration, from which
    ``|Q* - Q_k| <= gamma (e_k + beta^k D)``; the recursion gives ``e_{k+1} <= beta e_k + (1 - beta) |Q* - Q_k|``.
    Together ``e_k <= d^k (e_0 + D)``, hence ``C = |Q*| + |Q_0|``.

    :param mdp: the MDPs
    :param kl_coef: weight of the KL term
    :param ent_coef: weight of the entropy
    :param n_iterations: number of iterations
    :return: the bound relative to ``|Q*|``, shape (number of iterations, ...)
    """
    first = TabularStaQ(mdp, "exact", 0, kl_coef, ent_coef).evaluate()
    norms = [values.abs().amax(dim=(-2, -1)).numpy() for values in (first, mdp.optimal_q_values(ent_coef))]
    powers = linear_rate(kl_coef, ent_coef, mdp.gamma) ** np.arange(n_iterations)
    return np.multiply.outer(powers, 1 + norms[0] / norms[1])


def measured_rate(distances: np.ndarray, end: float = 1e-10) -> float:
    """
    :param distances: one per iteration, shape (number of iterations,)
    :param end: distance at which rounding begins to matter
    :return: the factor per iteration, from a straight line through the logarithms down to ``end``; NaN if that is not
        reached
    """
    below = np.flatnonzero(distances < end)
    if len(below) == 0:
        return math.nan
    used = distances[: max(below[0], 2)]
    return float(np.exp(np.polyfit(np.arange(len(used)), np.log(used), 1)[0]))


def floor(staq: TabularStaQ, n_iterations: int) -> tuple[float, float]:
    """
    :param staq: at its first iteration
    :param n_iterations: enough to converge
    :return: distances of ``Q_k`` and of ``ent_coef * xi_k`` that are left, the mean over the MDPs
    """
    for _ in range(n_iterations):
        staq.update(staq.evaluate())
    optimum = staq.mdp.optimal_q_values(staq.ent_coef)
    return distance(staq.evaluate(), optimum).mean(), distance(staq.scaled_logits, optimum).mean()


def fitted_slope(x: np.ndarray | pd.Series, y: np.ndarray | pd.Series, largest: float = 0.1) -> float:
    """
    :param x: abscissas
    :param y: ordinates; what is lost in rounding is left out
    :param largest: abscissas above are left out: the proportionality is one of small numbers
    :return: the slope on log axes
    """
    x, y = np.asarray(x), np.asarray(y)
    used = (x <= largest) & (y > 10 * RESOLUTION)
    return float(np.polyfit(np.log(x[used]), np.log(y[used]), 1)[0])


def noisy_iteration(staq: TabularStaQ, noise: float, n_burn_in: int, n_measured: int, seed: int) -> dict[str, float]:
    """
    Policy iteration with Gaussian noise, independent between iterations, states and actions, added to every ``Q_k``.

    :param staq: at its first iteration
    :param noise: standard deviation of the noise
    :param n_burn_in: iterations before the measurement
    :param n_measured: iterations of the measurement
    :param seed: of the noise
    :return: means over iterations and MDPs
    """
    generator = th.Generator().manual_seed(seed)
    optimum = staq.mdp.optimal_q_values(staq.ent_coef)
    sums = {"logit_error": 0.0, "value_loss": 0.0, "successive_kl": 0.0}
    for k in range(n_burn_in + n_measured):
        log_pi, q_values = staq.log_pi, staq.evaluate()
        if k >= n_burn_in:
            # A number added to all actions of a state changes nothing
            error = staq.scaled_logits - optimum
            sums["logit_error"] += (error - error.mean(dim=-1, keepdim=True)).square().mean().item()
            sums["value_loss"] += (optimum - q_values).mean().item()
        staq.update(q_values + noise * th.randn(q_values.shape, generator=generator, dtype=th.float64))
        if k >= n_burn_in:
            sums["successive_kl"] += kl_divergence(staq.log_pi, log_pi).mean().item()
    means = {name: value / n_measured for name, value in sums.items()}
    means["logit_error"] = math.sqrt(means["logit_error"])
    # Taking the mean off leaves all but one of the actions' degrees of freedom
    n_actions = staq.mdp.n_actions
    means["expected_logit_error"] = noise * staq.noise_gain * math.sqrt(1 - 1 / n_actions)
    return means


# The experiments: each returns a table of its numbers

N_MDPS = 5
GARNET: dict[str, Any] = {"n_states": 20, "n_actions": 4, "branching": 3, "gamma": 0.9}
GRID_WORLD: dict[str, Any] = {"gamma": 0.95, "slip": 0.1}
# (MDPs, kl_coef, ent_coef) by name
CONVERGENCE_SETTINGS = {
    "garnet": (garnet(range(N_MDPS), **GARNET), 0.9, 0.1),
    "grid": (grid_world(**GRID_WORLD), 0.45, 0.05),
}
TITLES = {"garnet": f"Garnet MDPs (worst of {N_MDPS})", "grid": "Grid world"}
N_ITERATIONS = 400
FLOOR_KL_COEFS = (0.1, 0.4, 0.9)
FLOOR_ENT_COEF = 0.1
FLOOR_MEMORY_SIZES = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150)
NOISE = 0.5
NOISE_KL_COEFS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
NOISE_ENT_COEF = 0.1
NOISE_MEASURED = 200
SMALL_KL_COEF, SMALL_ENT_COEF = 1.0, 1e-4
SMALL_GARNET: dict[str, Any] = {"n_states": 5, "n_actions": 3, "branching": 1, "gamma": 0.99}
N_SMALL_MDPS = 500


def run_convergence() -> tuple[pd.DataFrame, pd.DataFrame]:
    """
    :return: distances over the iterations, the worst of the MDPs; and the rates
    """
    curves, rates = [], []
    for name, (mdp, kl_coef, ent_coef) in CONVERGENCE_SETTINGS.items():
        bounds = bound(mdp, kl_coef, ent_coef, N_ITERATIONS)
        for rule, memory_size in VARIANTS:
            distances = convergence(TabularStaQ(mdp, rule, memory_size, kl_coef, ent_coef), N_ITERATIONS)
            measured = [[measured_rate(run) for run in quantity.reshape(N_ITERATIONS, -1).T] for quantity in distances]
            q_worst, logits_worst, bound_worst = (x.reshape(N_ITERATIONS, -1).max(axis=1) for x in (*distances, bounds))
            key = {"mdp": name, "rule": rule, "M": memory_size or math.inf}
            columns = {"q_distance": q_worst, "logit_distance": logits_worst, "bound": bound_worst}
            curves.append(pd.DataFrame({**key, "iteration": np.arange(N_ITERATIONS), **columns}))
            below = np.flatnonzero(q_worst < 1e-6)
            rates.append(
                {
                    **key,
                    "beta": decay_rate(kl_coef, ent_coef),
                    "d": linear_rate(kl_coef, ent_coef, mdp.gamma),
                    "q_rate": np.max(measured[0]),
                    "logit_rate": np.max(measured[1]),
                    # Rounding is no violation
                    "q_to_bound": ((distances[0] - RESOLUTION) / (mdp.gamma * bounds)).max(),
                    "logits_to_bound": ((distances[1] - RESOLUTION) / bounds).max(),
                    "iterations": below[0] if len(below) else math.nan,
                    "q_left": q_worst[-1],
                    "logits_left": logits_worst[-1],
                }
            )
    return pd.concat(curves), pd.DataFrame(rates)


def run_floors() -> pd.DataFrame:
    """
    :return: distances after convergence by rule, ``beta`` and ``M``
    """
    rows = []
    mdp = garnet(range(N_MDPS), **GARNET)
    for kl_coef in FLOOR_KL_COEFS:
        beta = decay_rate(kl_coef, FLOOR_ENT_COEF)
        for memory_size in FLOOR_MEMORY_SIZES:
            if beta**memory_size < RESOLUTION:
                continue
            for rule in FINITE_RULES:
                staq = TabularStaQ(mdp, rule, memory_size, kl_coef, FLOOR_ENT_COEF)
                q_floor, logit_floor = floor(staq, n_iterations=60 + math.ceil(math.log(1e-14) / math.log(beta)))
                rows.append({"rule": rule, "beta": beta, "M": memory_size, "beta^M": beta**memory_size})
                rows[-1] |= {"q_floor": q_floor, "logit_floor": logit_floor}
    return pd.DataFrame(rows)


def run_small_entropy() -> pd.DataFrame:
    """
    :return: how the corrected rule fares with little entropy, where theory asks for a large ``M``
    """
    rows = []
    mdp = garnet(range(N_SMALL_MDPS), **SMALL_GARNET)
    for memory_size in (1, 2, 5, 10):
        staq = TabularStaQ(mdp, "weight_corrected", memory_size, SMALL_KL_COEF, SMALL_ENT_COEF)
        q_distance, _ = convergence(staq, n_iterations=60)
        rose = (q_distance[1:] > q_distance[:-1] + RESOLUTION * 100).any(axis=0)
        rows.append({"M": memory_size, "q_rose": rose.mean(), "unconverged": (q_distance[-1] > 1e-6).mean()})
    return pd.DataFrame(rows)


def run_noise() -> pd.DataFrame:
    """
    :return: what noise does by rule, ``M`` and ``kl_coef``
    """
    rows = []
    mdp = garnet(range(N_MDPS), **GARNET)
    for rule, memory_size in VARIANTS:
        for kl_coef in NOISE_KL_COEFS:
            staq = TabularStaQ(mdp, rule, memory_size, kl_coef, NOISE_ENT_COEF)
            # Until the start is forgotten: beta^k is at most exp(-8)
            n_burn_in = math.ceil(8 / (1 - decay_rate(kl_coef, NOISE_ENT_COEF)))
            measured = noisy_iteration(staq, NOISE, n_burn_in, NOISE_MEASURED, seed=0)
            rows.append({"rule": rule, "M": memory_size or math.inf, "kl_coef": kl_coef, **measured})
    return pd.DataFrame(rows)


# Figures


def plot_variants(ax: Axes, rows: pd.DataFrame, rule: str, x: str, y: str, markevery: int) -> None:
    """
    One line per ``M``, and the exact rule beside them.

    :param ax: where to
    :param rows: numbers of all variants
    :param rule: the logit rule
    :param x: column for the horizontal axis
    :param y: column for the vertical axis
    :param markevery: points between markers
    """
    for memory_size in MEMORY_SIZES:
        line = rows[(rows["rule"] == rule) & (rows["M"] == memory_size)]
        style = {"color": COLORS[memory_size], "marker": MARKERS[memory_size], "markevery": markevery}
        ax.plot(line[x], line[y], label=f"M = {memory_size}", linewidth=2, markersize=6, **style)
    exact = rows[rows["rule"] == "exact"]
    ax.plot(exact[x], exact[y], color="black", linestyle="--", linewidth=1.5, label="exact")


def plot_convergence(curves: pd.DataFrame, name: str) -> Figure:
    """
    :param curves: distances over the iterations
    :param name: on which kind of MDP
    :return: the figure: ``Q_k`` above, logits below
    """
    mdp, kl_coef, ent_coef = CONVERGENCE_SETTINGS[name]
    curves = curves[curves["mdp"] == name]
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex=True, sharey=True)
    exact = curves[curves["rule"] == "exact"]
    quantities = {
        "q_distance": ("soft Q-function of $\\pi_k$", mdp.gamma),
        "logit_distance": ("logits, ent_coef $\\xi_k$", 1.0),
    }
    for row, (column, (title, factor)) in zip(axes, quantities.items(), strict=True):
        for ax, rule in zip(row, FINITE_RULES, strict=True):
            plot_variants(ax, curves, rule, "iteration", column, markevery=25)
            label = f"bound, falls as $d^k$, d = {linear_rate(kl_coef, ent_coef, mdp.gamma):.3f}"
            ax.plot(exact["iteration"], factor * exact["bound"], color="0.45", linestyle=":", linewidth=2, label=label)
            ax.set_title(f'"{rule}": {title}')
        row[0].set_ylabel("distance to $Q^*$, relative (sup norm)")
    axes[0, 0].set(yscale="log", ylim=(1e-16, 30), xlim=(0, N_ITERATIONS))
    for ax in axes[1]:
        ax.set_xlabel("iteration k (policy updates)")
    figure.suptitle(f"{TITLES[name]}: distance to the optimal soft Q-function")
    share_legend(figure, axes.flat)
    return figure


def plot_floors(floors: pd.DataFrame) -> Figure:
    """
    :param floors: distances after convergence
    :return: the figure: logits on the left, soft Q-function on the right
    """
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True)
    betas = sorted(floors["beta"].unique())
    palette = sns.color_palette("colorblind", len(betas))
    x = np.geomspace(1e-11, 1, 2)
    for ax, column, slope, line, reference, name in [
        (axes[0], "logit_floor", 1, "--", "$\\beta^M$", "logits, ent_coef $\\xi$"),
        (axes[1], "q_floor", 2, ":", "proportional to $\\beta^{2M}$", "soft Q-function of $\\pi$"),
    ]:
        for rule, filled in (("truncated", True), ("weight_corrected", False)):
            for beta, color, marker in zip(betas, palette, "osD", strict=True):
                rows = floors[(floors["rule"] == rule) & (floors["beta"] == beta)]
                face = color if filled else "none"
                label = f'"{rule}", $\\beta$ = {beta:.1f}'
                style = {"color": color, "marker": marker, "markerfacecolor": face, "linestyle": "none"}
                ax.plot(rows["beta^M"], rows[column], label=label, **style)
        ax.plot(x, x**slope, color="0.45", linestyle=line, linewidth=2, label=reference)
        ax.set(xscale="log", yscale="log", ylim=(1e-16, 3), xlabel="$\\beta^M$ (weight of the deleted Q-function)")
        ax.set_title(f"Error after convergence: {name}")
    axes[0].set_ylabel("distance to $Q^*$, relative (sup norm)")
    # The panels share all but their last entry
    handles, labels = axes[0].get_legend_handles_labels()
    last = [entries[-1:] for entries in axes[1].get_legend_handles_labels()]
    figure.tight_layout()
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False}
    figure.legend(handles + last[0], labels + last[1], ncols=3, **place)
    return figure


def plot_noise(noise: pd.DataFrame) -> Figure:
    """
    :param noise: what noise does
    :return: the figure: one row per rule, one column per measure
    """
    measures = {
        "logit_error": ("Error of the logits", "RMS error of ent_coef $\\xi_k$ (reward)"),
        "value_loss": ("Loss of value", "mean of $Q^* - Q_k$ (reward)"),
        "successive_kl": ("Change of the policy", "KL($\\pi_{k+1}$ || $\\pi_k$) (nats)"),
    }
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), sharex=True, sharey="col")
    for row, rule in zip(axes, FINITE_RULES, strict=True):
        for ax, (column, (title, y_label)) in zip(row, measures.items(), strict=True):
            plot_variants(ax, noise, rule, "kl_coef", column, markevery=1)
            ax.set(title=f'{title}, "{rule}"', ylabel=y_label, yscale="log")
    for ax in axes[1]:
        ax.set_xlabel("kl_coef (reward per nat)")
    axes[0, 0].set_xscale("symlog", linthresh=0.1)
    axes[0, 0].set_xticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    share_legend(figure, axes.flat)
    return figure


# The report


def variant_name(rule: str, memory_size: float) -> str:
    """
    :param rule: the logit rule
    :param memory_size: ``M``
    :return: what tables call them
    """
    return rule if math.isinf(memory_size) else f"{rule}, M = {memory_size:.0f}"


def convergence_section(rates: pd.DataFrame, small_entropy: pd.DataFrame) -> list[str]:
    """
    :param rates: rates of convergence
    :param small_entropy: what happens with little entropy
    :return: the section
    """
    text = [
        "## Convergence",
        "Distance of the soft Q-function of `pi_k` and of the logits `ent_coef * xi_k` to the optimal soft "
        "Q-function. The rate is the factor per iteration (straight line through the logarithms, down to 1e-10; the "
        "slowest of the MDPs). The bound is `gamma C d^k` for Q and `C d^k` for the logits, `C = |Q*| + |Q_0|`, "
        "proven for the exact rule; at most 1 in the columns *over bound* (highest ratio of distance and bound over "
        "all iterations and MDPs) means that it holds. *Left* is the distance in the end.",
    ]
    columns = ["", "rate, Q", "rate, logits", "over bound, Q", "over bound, logits", "iterations to 1e-6 (Q)"]
    for name, group in rates.groupby("mdp", sort=False):
        mdp, kl_coef, ent_coef = CONVERGENCE_SETTINGS[name]
        first = group.iloc[0]
        rows = {}
        for cell in group.itertuples():
            fitted = [f"{rate:.3f}" if rate == rate else "floor" for rate in (cell.q_rate, cell.logit_rate)]
            ratios = [f"{ratio:.2f}" for ratio in (cell.q_to_bound, cell.logits_to_bound)]
            reached = f"{cell.iterations:.0f}" if cell.iterations == cell.iterations else "never"
            left = [f"{value:.0e}" for value in (cell.q_left, cell.logits_left)]
            rows[variant_name(cell.rule, cell.M)] = [*fitted, *ratios, reached, *left]
        text += [
            f"### {TITLES[name]}",
            f"gamma = {mdp.gamma}, kl_coef = {kl_coef}, ent_coef = {ent_coef}: beta = {first['beta']:.3f}, "
            f"**d = {first['d']:.3f}**. {N_ITERATIONS} iterations.",
            markdown_table([*columns, "left, Q", "left, logits"], rows),
            f"![Distance over iterations](convergence_{name}.png)",
        ]
    rows = {
        f"M = {cell.M}": [f"{cell.q_rose:.1%}", f"{cell.unconverged:.1%}"]
        for cell in small_entropy.itertuples(index=False)
    }
    return [
        *text,
        "What the figures say:",
        "- The bound holds for the exact and the corrected rule, and is slack. Near the optimum the value of a "
        "policy is flat, the error of `Q_k` is of second order in that of the logits: the logits then shrink by "
        "`beta` per iteration and the Q-function by about `beta^2`, whatever gamma is.\n"
        '- "weight_corrected" converges for all M, and the *faster* the smaller M is: with exact evaluation, old '
        "Q-functions are only in the way (M = 1 is soft policy iteration, faster than any linear rate). Memory is "
        "for noise, see below. The error may rise for a moment when the first Q-functions are deleted (k near M).\n"
        '- "truncated" goes where its weights lead: they sum to `(1 - beta^M) / ent_coef`, the optimum for a larger '
        "entropy weight. Small M are useless with this beta.",
        "### Little entropy, small M",
        "The theory asks for a large M for the corrected rule. Looked for on purpose: does it fail below that? "
        f"{N_SMALL_MDPS} small deterministic Garnet MDPs ({describe(SMALL_GARNET)}), kl_coef = {SMALL_KL_COEF}, "
        f"ent_coef = {SMALL_ENT_COEF}, 60 iterations.",
        markdown_table(["", "error of Q rose at least once", "not within 1e-6 in the end"], rows),
        "Convergence is then not always monotone (for M = 1 and the exact rule it is, as every policy update "
        "improves the policy), but no lasting oscillation was found. That is no proof that there is none.",
    ]


def floor_section(floors: pd.DataFrame) -> list[str]:
    """
    :param floors: distances after convergence
    :return: the section
    """
    truncated, corrected = (floors[floors["rule"] == rule] for rule in ("truncated", "weight_corrected"))
    rows = {}
    for beta, group in truncated.groupby("beta"):
        slopes = [fitted_slope(group["beta^M"], group[column]) for column in ("logit_floor", "q_floor")]
        rest = corrected[corrected["beta"] == beta][["logit_floor", "q_floor"]].to_numpy().max()
        rows[f"beta = {beta:.1f}"] = [*(f"{slope:.3f}" for slope in slopes), f"{rest:.0e}"]
    some = {
        f"M = {cell.M}": [f"{cell[4]:.2e}", f"{cell.logit_floor:.2e}", f"{cell.q_floor:.2e}"]
        for cell in truncated[truncated["beta"] > 0.85].itertuples()
    }
    return [
        "## The error floor",
        f"Distances after convergence, mean of {N_MDPS} Garnet MDPs, ent_coef = {FLOOR_ENT_COEF}, kl_coef = "
        f"{', '.join(map(str, FLOOR_KL_COEFS))}. Slopes on log axes against `beta^M`, fitted where that is at most "
        "0.1:",
        markdown_table(
            ["", '"truncated": slope, logits', "slope, Q", '"weight_corrected": largest distance, any M'], rows
        ),
        "![Distance after convergence against beta^M](floors.png)",
        '"truncated" with beta = 0.9:',
        markdown_table(["", "beta^M", "left, logits", "left, Q"], some),
        "The floor of the logits is `beta^M` to three digits where that is small, in units of `|Q*|`: the missing "
        "weight. That of the soft Q-function goes with `beta^(2M)`, as it is of second order: a policy may be nearly "
        'optimal while its logits are not. "weight_corrected" has no floor but rounding, for any M.',
    ]


def noise_section(noise: pd.DataFrame) -> list[str]:
    """
    :param noise: what noise does
    :return: the section
    """
    tables: dict[str, dict[str, list[str]]] = {"value_loss": {}, "logit_error": {}}
    for column, rows in tables.items():
        for (rule, memory_size), group in noise.groupby(["rule", "M"], sort=False):
            rows[variant_name(rule, memory_size)] = [f"{value:.3f}" for value in group[column]]
    unbiased = noise[noise["rule"] != "truncated"]
    ratio = unbiased["logit_error"] / unbiased["expected_logit_error"]
    columns = ["", *(f"kl_coef = {kl_coef:g}" for kl_coef in NOISE_KL_COEFS)]
    return [
        "## Noise in the evaluation",
        f"Gaussian noise of standard deviation {NOISE} (rewards are in [0, 1]), independent between iterations, "
        f"states and actions, added to every `Q_k`. {N_MDPS} Garnet MDPs, ent_coef = {NOISE_ENT_COEF}, noise seed 0; "
        f"means over {NOISE_MEASURED} iterations after `8 / (1 - beta)` iterations that are not counted.",
        "Loss of value, the mean of `Q* - Q_k` (true soft Q-functions):",
        markdown_table(columns, tables["value_loss"]),
        "Root mean square error of the logits `ent_coef * xi_k`, less their mean in each state:",
        markdown_table(columns, tables["logit_error"]),
        "![Effect of noise over kl_coef and M](noise.png)",
        "The logits are a weighted mean of Q-functions, so their noise should be that of one Q-function times the "
        f'root sum of squares of the weights. For "exact" and "weight_corrected", measured over expected is '
        f"{ratio.min():.2f} to {ratio.max():.2f}. A larger kl_coef averages over more iterations, until the memory "
        "ends: with corrected weights kl_coef has then no more effect and the variance stays at one M-th. The loss of "
        "value falls about with the variance, the square.",
        '"truncated" averages as well but trades the noise for its bias: past some kl_coef it gets worse again. With '
        "M = 2 its best is nevertheless a little better than that of the corrected rule.",
    ]


def describe(settings: dict[str, Any]) -> str:
    """
    :param settings: parameters of an MDP
    :return: them as text
    """
    return ", ".join(f"{name} = {value}" for name, value in settings.items())


def write_report(folder: Path) -> Path:
    """
    Run everything.

    :param folder: where to write
    :return: the Markdown file
    """
    folder.mkdir(parents=True, exist_ok=True)
    sns.set_theme(style="whitegrid", context="notebook")
    (curves, rates), floors, small_entropy, noise = run_convergence(), run_floors(), run_small_entropy(), run_noise()
    # Every fourth iteration is enough for a file
    thinned = curves[curves["iteration"] % 4 == 0]
    tables = {"convergence": thinned, "rates": rates, "floors": floors, "small_entropy": small_entropy, "noise": noise}
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False, float_format="%.4g")
    for name in CONVERGENCE_SETTINGS:
        save(plot_convergence(curves, name), folder / f"convergence_{name}.png")
    save(plot_floors(floors), folder / "floors.png")
    save(plot_noise(noise), folder / "noise.png")
    text = [
        "# The theory on tabular MDPs",
        "`python -m benchmarks.tabular` writes this page, its figures and its CSV files. Policy evaluation is exact (a "
        "linear system, double precision); the policy update is the code of `sb3_staq.mirror_descent` that the deep "
        "algorithm runs; the reference `Q*` is from soft value iteration. Distances are sup norms over states and "
        "actions relative to that of `Q*`. All start from the uniform policy.",
        f"Garnet MDPs: {describe(GARNET)}; seeds 0 to {N_MDPS - 1}; rewards uniform in [0, 1]. Grid world: "
        f"{CONVERGENCE_SETTINGS['grid'][0].reward.shape[0]} states, 4 actions, {describe(GRID_WORLD)} (probability "
        "of a random move); reward -1 per step until the goal.",
        *convergence_section(rates, small_entropy),
        *floor_section(floors),
        *noise_section(noise),
    ]
    report = folder / "report.md"
    report.write_text("\n\n".join(text) + "\n")
    return report


def main() -> int:
    """
    :return: exit status
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tabular", description="The theory on tabular MDPs.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the report goes")
    print(write_report(parser.parse_args().folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
