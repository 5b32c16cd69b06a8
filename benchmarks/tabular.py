"""
The theory of StaQ on tabular MDPs: ``python -m benchmarks.tabular``.

Policy evaluation is exact here (a linear system), so only the policy update matters: the same code of
``sb3_staq.mirror_descent`` that the deep algorithm runs. Distances are sup norms relative to that of the optimal soft
Q-function, found by soft value iteration. Near the optimum, a policy loses value with the square of its logits' error.

*Why the average over a long memory is a better policy than the last one if the evaluation has errors.* Under errors,
mirror descent bounds the regret, which is about the average over the updates; it promises nothing about the last
policy. The logits are weighted sums of Q-functions, so their average over a window is, except at its ends, the plain
average of the Q-functions times the sum of the weights. The last policy averages as well, but over at most about
``(1+beta)/(1-beta)`` updates, so its error does not shrink, however long the run. The average of ``W`` Q-functions
keeps 1/W of the variance of independent errors, and about as much of the value that they cost. Errors that the
Q-functions share remain, for instance that they are values of policies below the optimum.
"""

import argparse
import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch as th
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.figures import BLUE, GREEN, ORANGE, SKY, VERMILLION, save, share_legend
from benchmarks.tabular_mdps import TabularMDP, garnet, grid_world
from sb3_staq.memory_bounds import memory_bound
from sb3_staq.mirror_descent import LogitRule, StackWeights, decay_rate, kl_divergence, log_policy

FOLDER = Path(__file__).parent / "results" / "tabular"
TEMPLATE = Path(__file__).parent / "tabular.md"  # of the report; it also takes the constants below
RESOLUTION = 1e-12  # limit of double precision: anything smaller counts as converged
MEMORY_SIZES = (2, 5, 10, 50, 300)
FINITE_RULES = ("weight_corrected", "truncated")
VARIANTS = [("exact", 0)] + [(rule, memory_size) for rule in FINITE_RULES for memory_size in MEMORY_SIZES]
GARNET: dict[str, Any] = {"n_states": 20, "n_actions": 4, "branching": 3, "gamma": 0.9}
SMALL_GARNET: dict[str, Any] = {"n_states": 5, "n_actions": 3, "branching": 1, "gamma": 0.99}
GRID_WORLD: dict[str, Any] = {"gamma": 0.95, "slip": 0.1}
MDPS = garnet(range(5), **GARNET)
# (MDPs, kl_coef, ent_coef) by name
CONVERGENCE_SETTINGS = {"garnet": (MDPS, 0.9, 0.1), "grid": (grid_world(**GRID_WORLD), 0.45, 0.05)}
TITLES = {"garnet": "worst Garnet MDP", "grid": "grid world"}
N_ITERATIONS = 400
ENT_COEF, NOISE = 0.1, 0.5  # of the floors, the noise and the average
SMALL_KL_COEF, SMALL_ENT_COEF, N_SMALL_MDPS = 1.0, 1e-4, 500

# Lines by M
LINES: dict[float, dict[str, Any]] = {
    memory_size: {"color": color, "marker": marker, "label": f"M = {memory_size}"}
    for memory_size, color, marker in zip(MEMORY_SIZES, (VERMILLION, ORANGE, GREEN, SKY, BLUE), "osD^v", strict=True)
}
LINES[math.inf] = {"color": "black", "linestyle": "--", "linewidth": 1.5, "label": "exact"}
REFERENCE: dict[str, Any] = {"color": "0.4", "linestyle": ":", "linewidth": 2}
STYLE: dict[Any, Any] = {"font.size": 11, "axes.titlesize": 11, "lines.linewidth": 2}
STYLE |= {"axes.grid": True, "grid.color": "0.9", "grid.linewidth": 1}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}


class TabularStaQ:
    """Policy mirror descent on a batch of MDPs; ``logit_rule`` and ``memory_size`` as in ``StackWeights``."""

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
        """``ent_coef * xi_k``, which should converge to the optimal soft Q-function, shape (..., states, actions)."""
        return self.ent_coef * self.weights.scale * self.total

    @property
    def noise_gain(self) -> float:
        """Standard deviation of noise in :attr:`scaled_logits`, relative to that in the Q-functions."""
        return self.ent_coef * self.weights.scale * math.hypot(*self.weights.values)

    def evaluate(self) -> th.Tensor:
        """Compute the soft Q-function of the policy, shape (..., states, actions)."""
        return self.mdp.evaluate(self.log_pi, self.ent_coef)

    def noisy_evaluations(self, n: int, seed: int) -> Iterator[tuple[th.Tensor, th.Tensor]]:
        """Yield ``n`` times the policy's soft Q-function, without and with new Gaussian noise in every entry."""
        generator = th.Generator().manual_seed(seed)
        for _ in range(n):
            q_values = self.evaluate()
            yield q_values, q_values + NOISE * th.randn(q_values.shape, generator=generator, dtype=th.float64)

    def update(self, q_values: th.Tensor) -> None:
        """Update the policy with ``Q_k``, shape (..., states, actions)."""
        update = self.weights.push(self.kl_coef, self.ent_coef)
        deleted = [self.stack.popleft() for _ in update.deleted_weights]
        if self.weights.logit_rule != "exact":  # that rule would keep all of them, and needs none
            self.stack.append(q_values)
        if self.weights.recursive:
            self.total = update.apply(self.total, q_values, deleted)
        else:
            products = [weight * q for weight, q in zip(self.weights.values, self.stack, strict=True)]
            self.total = th.stack(products).sum(dim=0)

    def averaged(self, q_values: Sequence[th.Tensor]) -> th.Tensor:
        """Compute log-probabilities with the mean of these Q-functions times the rule's sum of weights as logits."""
        mean = th.stack(list(q_values)).mean(dim=0)
        return log_policy(self.weights.scale * self.weights.total * mean, (self.mdp.n_actions,))


def sup_norm(q_values: th.Tensor) -> np.ndarray:
    """Find the largest absolute value of each MDP: shape (..., states, actions) -> (...)."""
    return q_values.abs().amax(dim=(-2, -1)).numpy()


def convergence(staq: TabularStaQ, n_iterations: int) -> np.ndarray:
    """
    Compute the distances of ``Q_k`` and ``ent_coef * xi_k`` to the optimum before each update, relative to its norm.

    From the current iteration of ``staq`` on; shape (2, number of iterations, ...).
    """
    optimum = staq.mdp.optimal_q_values(staq.ent_coef)
    distances = []
    for _ in range(n_iterations):
        q_values = staq.evaluate()
        distances.append([sup_norm(values - optimum) / sup_norm(optimum) for values in (q_values, staq.scaled_logits)])
        staq.update(q_values)
    return np.array(distances).swapaxes(0, 1)


def floor(staq: TabularStaQ, n_iterations: int) -> np.ndarray:
    """Compute the two distances of :func:`convergence` left after ``n_iterations`` updates, mean over the MDPs."""
    return convergence(staq, n_iterations + 1)[:, -1].reshape(2, -1).mean(axis=1)


def linear_rate(kl_coef: float, ent_coef: float, gamma: float) -> float:
    """Return ``d = beta + gamma (1 - beta)``, the proven rate of convergence."""
    beta = decay_rate(kl_coef, ent_coef)
    return beta + gamma * (1 - beta)


def bound(mdp: TabularMDP, kl_coef: float, ent_coef: float, n_iterations: int) -> np.ndarray:
    """
    Compute ``C d^k``, the bound on the distance of ``ent_coef * xi_k`` for the exact rule; ``gamma`` times it for Q.

    With ``xi_0 = 0``, ``e_k = |Q* - ent_coef xi_k|`` and ``D = |Q_0|``: the policy improves at every iteration, so
    ``|Q* - Q_k| <= gamma (e_k + beta^k D)``; the recursion gives ``e_{k+1} <= beta e_k + (1 - beta) |Q* - Q_k|``.
    Together ``e_k <= d^k (e_0 + D)``, hence ``C = |Q*| + |Q_0|``. Relative to ``|Q*|``, shape (n_iterations, ...).
    """
    first = TabularStaQ(mdp, "exact", 0, kl_coef, ent_coef).evaluate()
    powers = linear_rate(kl_coef, ent_coef, mdp.gamma) ** np.arange(n_iterations)
    return np.multiply.outer(powers, 1 + sup_norm(first) / sup_norm(mdp.optimal_q_values(ent_coef)))


def measured_rate(distances: np.ndarray, end: float = 1e-10) -> float:
    """
    Fit the factor per iteration, by a straight line through the logarithms of the distances down to ``end``.

    Shape (iterations,) -> a number; NaN if ``end`` is not reached. Below it, rounding matters.
    """
    below = np.flatnonzero(distances < end)
    if len(below) == 0:
        return math.nan
    used = distances[: max(below[0], 2)]
    return float(np.exp(np.polyfit(np.arange(len(used)), np.log(used), 1)[0]))


def fitted_slope(x: np.ndarray | pd.Series, y: np.ndarray | pd.Series, largest: float = 0.1) -> float:
    """
    Fit the slope on log axes.

    Abscissas above ``largest`` are left out, as proportionality is for small numbers; so are those lost to rounding.
    """
    x, y = np.asarray(x), np.asarray(y)
    used = (x <= largest) & (y > 10 * RESOLUTION)
    return float(np.polyfit(np.log(x[used]), np.log(y[used]), 1)[0])


def run_convergence() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure distances over the iterations, those of the worst MDP, and rates."""
    curves, rates = [], []
    for name, (mdp, kl_coef, ent_coef) in CONVERGENCE_SETTINGS.items():
        limit = bound(mdp, kl_coef, ent_coef, N_ITERATIONS).reshape(N_ITERATIONS, -1)
        for rule, memory_size in VARIANTS:
            row: dict[str, Any] = {"MDPs": name, "rule": rule, "M": memory_size or math.inf}
            distances = convergence(TabularStaQ(mdp, rule, memory_size, kl_coef, ent_coef), N_ITERATIONS)
            distances = distances.reshape(2, N_ITERATIONS, -1)
            q_worst, logits_worst = distances.max(axis=2)
            curve = {"iteration": np.arange(N_ITERATIONS), "Q": q_worst, "logits": logits_worst}
            curves.append(pd.DataFrame({**row, **curve, "bound": limit.max(axis=1)}))
            for quantity, runs, factor in zip(("Q", "logits"), distances, (mdp.gamma, 1.0), strict=True):
                row[f"rate, {quantity}"] = np.max([measured_rate(run) for run in runs.T])
                # Rounding errors are not violations
                row[f"over bound, {quantity}"] = ((runs - RESOLUTION) / (factor * limit)).max()
                row[f"left, {quantity}"] = runs[-1].max()
            rates.append({**row, "iterations to 1e-6 (Q)": next(iter(np.flatnonzero(q_worst < 1e-6)), math.nan)})
    return pd.concat(curves), pd.DataFrame(rates)


def run_floors() -> pd.DataFrame:
    """Measure distances after convergence by rule, ``beta`` and ``M``."""
    rows = []
    for kl_coef in (0.1, 0.4, 0.9):
        beta = decay_rate(kl_coef, ENT_COEF)
        for memory_size in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150):
            for rule in FINITE_RULES if beta**memory_size >= RESOLUTION else ():
                staq = TabularStaQ(MDPS, rule, memory_size, kl_coef, ENT_COEF)
                left = floor(staq, n_iterations=60 + math.ceil(math.log(1e-14) / math.log(beta)))
                rows.append([rule, beta, memory_size, beta**memory_size, *left])
    return pd.DataFrame(rows, columns=["rule", "beta", "M", "beta^M", "left, Q", "left, logits"])


def run_small_entropy() -> pd.DataFrame:
    """Measure how the corrected rule fares with little entropy, where the theorem asks for a large ``M``."""
    rows = []
    mdp = garnet(range(N_SMALL_MDPS), **SMALL_GARNET)
    for memory_size in (1, 2, 5, 10):
        staq = TabularStaQ(mdp, "weight_corrected", memory_size, SMALL_KL_COEF, SMALL_ENT_COEF)
        q_distance, _ = convergence(staq, n_iterations=60)
        rose = (q_distance[1:] > q_distance[:-1] + RESOLUTION * 100).any(axis=0)
        rows.append([memory_size, rose.mean(), (q_distance[-1] > 1e-6).mean()])
    return pd.DataFrame(rows, columns=["M", "error of Q rose at least once", "not within 1e-6 in the end"])


def run_noise() -> pd.DataFrame:
    """Measure effects of noise in each evaluation by rule, ``M`` and ``kl_coef``: mean over 200 iterations and MDPs."""
    rows = []
    optimum = MDPS.optimal_q_values(ENT_COEF)
    for rule, memory_size in VARIANTS:
        for kl_coef in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0):
            staq = TabularStaQ(MDPS, rule, memory_size, kl_coef, ENT_COEF)
            n_burn_in = math.ceil(8 / (1 - decay_rate(kl_coef, ENT_COEF)))  # the start fades to exp(-8)
            measured = []
            for q_values, noisy in staq.noisy_evaluations(n_burn_in + 200, seed=0):
                log_pi, error = staq.log_pi, staq.scaled_logits - optimum
                staq.update(noisy)
                # A number added to all actions of a state changes nothing
                squares = (error - error.mean(dim=-1, keepdim=True)).square()
                kl = kl_divergence(staq.log_pi, log_pi)
                measured.append([x.mean().item() for x in (squares, optimum - q_values, kl)])
            variance, loss, kl = np.mean(measured[n_burn_in:], axis=0)
            # Subtracting the mean leaves all but one of the actions' degrees of freedom
            expected = NOISE * staq.noise_gain * math.sqrt(1 - 1 / MDPS.n_actions)
            rows.append([rule, memory_size or math.inf, kl_coef, math.sqrt(variance), loss, kl, expected])
    columns = ["rule", "M", "kl_coef", "logit_error", "value_loss", "successive_kl", "expected_logit_error"]
    return pd.DataFrame(rows, columns=columns)


def run_average(seeds: Sequence[int] = range(20), windows: Sequence[int] = (1, 5, 20, 60, 180, 540)) -> pd.DataFrame:
    """
    Measure what the averaged and the last policy lose under noise, by ``kl_coef``, window and seed.

    The averaged policy is that of the mean of the last ``W`` noisy Q-functions; the last policy is from the same time
    of the same run. The loss is ``V* - V``, in exact soft values, averaged over the states. Each seed has its own
    random MDP and noise.
    """
    tables = []
    for kl_coef in (0.05, 0.9):
        memory_size = memory_bound(GARNET["gamma"], kl_coef, ENT_COEF)
        staq = TabularStaQ(garnet(seeds, **GARNET), "weight_corrected", memory_size, kl_coef, ENT_COEF)
        optimum = ENT_COEF * th.logsumexp(staq.mdp.optimal_q_values(ENT_COEF) / ENT_COEF, dim=-1)
        noisy_q_values: list[th.Tensor] = []
        for _, noisy in staq.noisy_evaluations(2 * memory_size + max(windows), seed=seeds[0]):
            staq.update(noisy)
            noisy_q_values.append(noisy)
            window = len(noisy_q_values) - 2 * memory_size
            if window in windows:
                policies = {"averaged": staq.averaged(noisy_q_values[-window:]), "last": staq.log_pi}
                values = {name: staq.mdp.soft_values(log_pi, ENT_COEF) for name, log_pi in policies.items()}
                losses = {name: (optimum - value).mean(dim=-1) for name, value in values.items()}
                key = {"kl_coef": kl_coef, "M": memory_size, "W": window, "seed": seeds}
                tables.append(pd.DataFrame({**key, **losses}))
    return pd.concat(tables, ignore_index=True)


def rule_panels(table: pd.DataFrame, x: str, measures: dict[str, str], x_label: str, markevery: int = 1) -> Figure:
    """Plot one row per finite rule, one column per measure (label by name): a line per ``M``, and the exact rule."""
    n = len(measures)
    figure, axes = plt.subplots(2, n, figsize=(2 + 4.3 * n, 7.5), sharex=True, sharey="col", squeeze=False)
    for ax, (rule, (column, label)) in zip(axes.flat, product(FINITE_RULES, measures.items()), strict=True):
        for memory_size, line in table[table["rule"].isin([rule, "exact"])].groupby("M"):
            ax.plot(line[x], line[column], markevery=markevery, **LINES[memory_size])
        ax.set(title=f'"{rule}"', xlabel=x_label, ylabel=label, yscale="log")
    for ax in axes[0]:
        ax.set_xlabel("")
    return figure


def plot_convergence(curves: pd.DataFrame, name: str) -> Figure:
    """Plot distances over the iterations on one kind of MDP."""
    mdp, kl_coef, ent_coef = CONVERGENCE_SETTINGS[name]
    curves = curves[curves["MDPs"] == name]
    measures = {"Q": "$Q_k$: relative distance to $Q^*$", "logits": "ent_coef $\\xi_k$: relative distance to $Q^*$"}
    figure = rule_panels(curves, "iteration", measures, "iteration k (policy updates)", markevery=20)
    limit = curves[curves["rule"] == "exact"].set_index("iteration")["bound"]
    label = f"bound, falls as $d^k$, d = {linear_rate(kl_coef, ent_coef, mdp.gamma):.3f}"
    for ax, factor in zip(figure.axes, (mdp.gamma, 1.0) * 2, strict=True):
        ax.plot(factor * limit, label=label, **REFERENCE)
        ax.set(ylim=(1e-14, 30), xlim=(0, N_ITERATIONS))  # below this is rounding
        ax.set_title(f"{TITLES[name]}, {ax.get_title()}")
    return share_legend(figure, ncols=7)


def plot_floors(floors: pd.DataFrame) -> Figure:
    """Plot distances after convergence: logits on the left, soft Q-function on the right."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True)
    x = np.geomspace(1e-11, 1, 2)
    for ax, quantity, slope, line in zip(axes, ("logits", "Q"), (1, 2), ("--", ":"), strict=True):
        for rule in ("truncated", "weight_corrected"):
            for (beta, group), color, marker in zip(floors.groupby("beta"), (BLUE, ORANGE, GREEN), "osD", strict=True):
                rows = group[group["rule"] == rule]
                style = {"color": color, "markerfacecolor": color if rule == "truncated" else "none"}
                label = f'"{rule}", $\\beta$ = {beta:.1f}'
                ax.plot(rows["beta^M"], rows[f"left, {quantity}"], marker, label=label, **style)
        label = "$\\beta^M$" if slope == 1 else "$\\beta^{2M}$"
        ax.plot(x, x**slope, label=label, **(REFERENCE | {"linestyle": line}))
        ax.set(xscale="log", yscale="log", ylim=(1e-16, 3), xlabel="$\\beta^M$ (weight of the deleted Q-function)")
    axes[0].set(title="Logits after convergence", ylabel="distance to $Q^*$, relative (sup norm)")
    axes[1].set(title="Soft Q-function after convergence")
    return share_legend(figure, ncols=3)


def plot_noise(noise: pd.DataFrame) -> Figure:
    """Plot effects of noise: error of the logits, loss of value, change of the policy per update."""
    measures = {"logit_error": "RMS error of ent_coef $\\xi_k$", "value_loss": "mean of $Q^* - Q_k$"}
    measures["successive_kl"] = "KL($\\pi_{k+1}$ || $\\pi_k$) in nats"
    figure = rule_panels(noise, "kl_coef", measures, "kl_coef (reward per nat)")
    for ax in figure.axes:
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter="{x:g}", minor_locator=NullLocator())
    figure.axes[0].set_xscale("symlog", linthresh=0.1)
    figure.axes[0].set_xticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    return share_legend(figure, ncols=6)


def plot_average(losses: pd.DataFrame) -> Figure:
    """Plot losses of the averaged and the last policy over the window: the mean, and the middle 80% of the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    for ax, (kl_coef, rows) in zip(axes, losses.groupby("kl_coef"), strict=True):
        groups, beta = rows.groupby("W"), decay_rate(kl_coef, ENT_COEF)
        for policy, color, marker in (("averaged", BLUE, "o"), ("last", VERMILLION, "s")):
            mean, low, high = groups[policy].mean(), groups[policy].quantile(0.1), groups[policy].quantile(0.9)
            ax.plot(mean, color=color, marker=marker, label=f"{policy} policy")
            ax.fill_between(mean.index, low, high, color=color, alpha=0.2, linewidth=0)
        ax.fill_between([], [], color="0.85", label="middle 80% of the seeds")
        ax.axvline((1 + beta) / (1 - beta), color="black", linestyle="--", linewidth=1, label="$(1+\\beta)/(1-\\beta)$")
        windows = mean.index.to_numpy()
        anchor = windows[len(windows) // 2]
        ax.plot(windows, anchor * groups["averaged"].mean()[anchor] / windows, label="slope of 1/W", **REFERENCE)
        ax.set(xscale="log", yscale="log", xlabel="W (policy updates in the window)")
        ax.set_title(f"kl_coef = {kl_coef:g}, $\\beta$ = {beta:.2f}")
        ax.set_xticks(windows, map(str, windows))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter="{x:g}", minor_locator=NullLocator())
    axes[0].set_ylabel("loss of value, mean of $V^* - V$")
    return share_legend(figure, ncols=5)


def markdown(table: pd.DataFrame, *formats: str) -> str:
    """Write a Markdown table: one format per column, the last one also for the rest; "–" where there is no number."""
    formats += formats[-1:] * (table.shape[1] - len(formats))
    return table.astype(object).where(table.notna(), None).to_markdown(index=False, floatfmt=formats, missingval="–")


def settings_table() -> str:
    """Tabulate what :func:`run_convergence` ran on."""
    rows = []
    for name, (mdp, kl, ent) in CONVERGENCE_SETTINGS.items():
        theory = decay_rate(kl, ent), linear_rate(kl, ent, mdp.gamma), memory_bound(mdp.gamma, kl, ent)
        rows.append([name, mdp.gamma, kl, ent, *theory])
    columns = ["MDPs", "gamma", "kl_coef", "ent_coef", "beta", "d", "M of the theorem"]
    return markdown(pd.DataFrame(rows, columns=columns), "g")


def floor_tables(floors: pd.DataFrame) -> tuple[str, str]:
    """Tabulate fitted slopes by ``beta``, and the numbers of the truncated rule with the largest ``beta``."""
    rows = []
    for beta, group in floors.groupby("beta"):
        truncated, corrected = (group[group["rule"] == rule] for rule in ("truncated", "weight_corrected"))
        slopes = [fitted_slope(truncated["beta^M"], truncated[f"left, {quantity}"]) for quantity in ("logits", "Q")]
        rows.append([beta, *slopes, corrected[["left, Q", "left, logits"]].max(axis=None)])
    columns = ["beta", '"truncated": slope, logits', "slope, Q", '"weight_corrected": largest distance, any M']
    largest = truncated[["M", "beta^M", "left, logits", "left, Q"]]
    return markdown(pd.DataFrame(rows, columns=columns), ".1f", ".3f", ".3f", ".0e"), markdown(largest, ".2e")


def noise_table(noise: pd.DataFrame, column: str) -> str:
    """Tabulate one measure of :func:`run_noise`: variants down, ``kl_coef`` across."""
    table = noise.pivot(index=["rule", "M"], columns="kl_coef", values=column)
    return markdown(table.rename(columns="kl_coef = {:g}".format).reset_index(), "", ".0f", ".3f")


def average_table(average: pd.DataFrame) -> str:
    """Tabulate the losses of :func:`run_average`: mean and standard deviation over the seeds."""
    table = average.groupby(["kl_coef", "M", "W"])[["averaged", "last"]].agg(["mean", "std"]).reset_index()
    table.columns = ["kl_coef", "M", "W", "averaged, mean", "averaged, std", "last, mean", "last, std"]
    return markdown(table, "g", "g", "g", ".3f")


def main() -> int:
    """Run everything, write the report, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tabular", description="The theory on tabular MDPs.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the report goes")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    curves, rates = run_convergence()
    floors, small_entropy, noise, average = run_floors(), run_small_entropy(), run_noise(), run_average()
    # Every fourth iteration is enough for a file
    tables = {"convergence": curves[curves["iteration"] % 4 == 0], "rates": rates, "floors": floors}
    tables |= {"small_entropy": small_entropy, "noise": noise, "average": average}
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False, float_format="%.4g")
    with plt.rc_context(STYLE):
        figures = {f"convergence_{name}": plot_convergence(curves, name) for name in CONVERGENCE_SETTINGS}
        figures |= {"floors": plot_floors(floors), "noise": plot_noise(noise), "average": plot_average(average)}
        for name, figure in figures.items():
            save(figure, folder / f"{name}.png")
    slopes, largest = floor_tables(floors)
    unbiased = noise[noise["rule"] != "truncated"]
    noise_ratio = unbiased["logit_error"] / unbiased["expected_logit_error"]
    report = TEMPLATE.read_text().format(
        **{name: value for name, value in globals().items() if name.isupper()},
        settings=settings_table(),
        rates=markdown(rates, "", "", ".0f", *(".3f", ".2f", ".0e") * 2, ".0f"),
        small_bound=memory_bound(SMALL_GARNET["gamma"], SMALL_KL_COEF, SMALL_ENT_COEF),
        small_entropy=markdown(small_entropy, ".0f", ".1%"),
        slopes=slopes,
        largest=largest,
        value_loss=noise_table(noise, "value_loss"),
        logit_error=noise_table(noise, "logit_error"),
        noise_ratio=(noise_ratio.min(), noise_ratio.max()),
        average=average_table(average),
    )
    (folder / "report.md").write_text(report)
    print(folder / "report.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
