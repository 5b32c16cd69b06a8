"""Markdown and figures from the result files of a suite, and from nothing else."""

from collections.abc import Iterable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from benchmarks import statistics
from benchmarks.results import Results
from benchmarks.suites import Suite, file_name

LABELS = {
    "staq": "StaQ",
    "dqn": "DQN",
    "qrdqn": "QR-DQN",
    "ppo": "PPO",
    "trpo": "TRPO",
    "sac": "SAC",
    "td3": "TD3",
    "tqc": "TQC",
    "crossq": "CrossQ",
    "staq_additive": "StaQ, additive critics",
}
# Dashes beside colours that colour-blind people can tell apart
STYLES = ["", (5, 2), (1, 1), (5, 1, 1, 1), (3, 1, 1, 1, 1, 1), (8, 2), (2, 2), (8, 1, 2, 1), (1, 3), (5, 1)]

# Algorithms with fewer trainings in common are not compared over all environments
MIN_RUNS = 2

# Evaluations at the end of a training whose mean is reported
N_LAST = 5

# What all trainings of an algorithm in an environment should have in common
SETTINGS = ("hyperparams_sha256", "steps", "eval_freq", "n_eval_episodes")

# The measures of stability, in the order of tables and panels
STABILITY = ("across time", "short-term risk", "long-term risk", "across runs", "across episodes")


def label(algo: str) -> str:
    """
    :param algo: name of an algorithm in a suite
    :return: what it is called in reports
    """
    base, _, variant = algo.partition("_")
    return LABELS.get(algo) or (f"{label(base)}, {variant}" if variant else algo.upper())


def styles(labels: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    :param labels: of the algorithms in a figure
    :return: colours and dashes by label; those in ``LABELS`` look the same in all figures
    """
    names = list(dict.fromkeys([*LABELS.values(), *labels]))
    colors = dict(zip(names, cycle(sns.color_palette("colorblind")), strict=False))
    return colors, dict(zip(names, cycle(STYLES), strict=False))


def write_report(suite: Suite, folder: Path) -> Path:
    """
    :param suite: the suite
    :param folder: where its results are, and where the report goes
    :return: the Markdown file
    """
    curves, finals = load_results(suite, folder)
    if curves.empty:
        raise SystemExit(f"No results in {folder}; run the suite first")
    text = [f"# Suite `{suite.name}`", suite.description, summary(suite, finals)]

    sns.set_theme(style="whitegrid", context="notebook")
    save(plot_curves(suite, curves, "step", "environment steps"), folder / "curves.png")
    curves["minutes"] = curves.groupby(["env", "algo", "step"])["seconds"].transform("mean") / 60
    save(plot_curves(suite, curves, "minutes", "minutes of training"), folder / "wall_clock.png")
    text += [
        "## Learning curves",
        f"Greedy evaluations, {suite.n_eval_episodes} episodes each on fixed seeds. Mean over the seeds, with 95% "
        "bootstrap confidence bands.",
        "![Return over environment steps](curves.png)",
        "The same over wall-clock time (one thread a run, evaluations not counted). It depends on the machine, and on "
        "what else ran on it.",
        "![Return over wall-clock time](wall_clock.png)",
    ]
    if not finals.empty:
        text += final_section(suite, curves, finals)
        text += aggregate_section(finals, folder)
        text += stability_section(curves, finals, folder)
    report = folder / "report.md"
    report.write_text("\n\n".join(text) + "\n")
    return report


def load_results(suite: Suite, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """
    :param suite: the suite
    :param folder: where its results are
    :return: evaluations during the trainings, and final evaluations of those that are complete; one row each
    """
    training: list[dict[str, Any]] = []
    final: list[dict[str, Any]] = []
    for env_id, env in suite.envs.items():
        for algo in suite.algos:
            for path in sorted((folder / file_name(env_id) / algo).glob("seed_*.csv")):
                results = Results.read(path)
                freq = results.metadata["eval_freq"]
                for evaluation in results.evaluations:
                    row = {
                        "env": env_id,
                        "algo": label(algo),
                        "seed": results.metadata["seed"],
                        "asked": results.metadata["steps"],
                        # With several environments, evaluations are a few steps late
                        "step": evaluation.step if evaluation.final else evaluation.step // freq * freq,
                        "seconds": evaluation.seconds,
                        "cpu_seconds": evaluation.cpu_seconds,
                        "return": evaluation.mean,
                        "score": statistics.normalise(evaluation.mean, env.random, env.reference),
                        "episodes": statistics.normalise(np.array(evaluation.returns), env.random, env.reference),
                        "settings": tuple(results.metadata[key] for key in SETTINGS),
                    }
                    (final if evaluation.final else training).append(row)
    return pd.DataFrame(training), pd.DataFrame(final)


def summary(suite: Suite, finals: pd.DataFrame) -> str:
    """How much there is, and whether it belongs together."""
    lines = [f"{len(finals)} complete trainings."]
    groups = finals.groupby(["env", "algo"], sort=False) if len(finals) else []
    for (env_id, algo), group in groups:
        if group["settings"].nunique() > 1:
            lines.append(f"**{algo} on {env_id}: not all seeds have the same hyperparameters, steps and evaluations.**")
    for env_id, lengths in finals.groupby("env", sort=False)["asked"].unique().items() if len(finals) else []:
        if len(lengths) > 1:
            lines.append(f"**{env_id}: trainings of {' and '.join(f'{n:,}' for n in sorted(lengths))} steps.**")
    n_seeds = len(suite.seeds)
    counts = {f"{algo} on {env_id}": len(group) for (env_id, algo), group in groups}
    wanted = [f"{label(algo)} on {env_id}" for env_id in suite.envs for algo in suite.algos]
    missing = [f"{name} ({counts.get(name, 0)} of {n_seeds})" for name in wanted if counts.get(name, 0) < n_seeds]
    if missing:
        lines.append(f"Seeds that the suite asks for and that are not complete: {', '.join(missing)}.")
    return " ".join(lines)


def plot_curves(suite: Suite, curves: pd.DataFrame, x: str, x_label: str) -> Figure:
    """
    One panel per environment: mean return over ``x``, with 95% bootstrap bands over the seeds, and published returns.

    :param suite: the suite
    :param curves: evaluations during the trainings
    :param x: column for the horizontal axis
    :param x_label: its label
    :return: the figure
    """
    env_ids = [env_id for env_id in suite.envs if env_id in set(curves["env"])]
    n_columns = min(len(env_ids), 2 if len(env_ids) <= 4 else 3)
    n_rows = -(-len(env_ids) // n_columns)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=(5.5 * n_columns, 3.8 * n_rows + 0.8), squeeze=False)
    algos = [label(algo) for algo in suite.algos if label(algo) in set(curves["algo"])]
    colors, dashes = styles(map(label, suite.algos))
    for ax, env_id in zip(axes.flat, env_ids, strict=False):
        sns.lineplot(
            curves[curves["env"] == env_id],
            x=x,
            y="return",
            hue="algo",
            style="algo",
            hue_order=algos,
            style_order=algos,
            palette=colors,
            dashes=dashes,
            errorbar=("ci", 95),
            n_boot=500,
            seed=0,
            linewidth=2,
            ax=ax,
        )
        env = suite.envs[env_id]
        for algo, value in env.published.items():
            name = f"{label(algo)}, published ({suite.published_steps:,} steps)"
            ax.axhline(value, color=colors[label(algo)], linewidth=1.5, linestyle=":", label=name)
        if env.reference not in env.published.values():
            ax.axhline(env.reference, color="0.4", linewidth=1, linestyle=":", label="reference")
        n_seeds = curves[curves["env"] == env_id].groupby("algo")["seed"].nunique()
        seeds = " to ".join(str(n) for n in sorted({n_seeds.min(), n_seeds.max()}))
        ax.set(title=f"{env_id} (seeds: {seeds})", xlabel=x_label, ylabel="return per episode")
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.xaxis.set_major_locator(MaxNLocator(6))
    share_legend(figure, axes.flat)
    for ax in list(axes.flat)[len(env_ids) :]:
        ax.remove()
    return figure


def share_legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One legend above all panels in place of one in each."""
    entries = {}
    for ax in axes:
        entries.update(dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True)))
        legend = ax.get_legend()
        if legend is not None:
            legend.remove()
    figure.tight_layout()
    legend = figure.legend(entries.values(), entries.keys(), ncols=len(entries), loc="lower center", frameon=False)
    legend.set_bbox_to_anchor((0.5, 1.0))


def save(figure: Figure, path: Path) -> None:
    """Write a figure and forget it."""
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def final_section(suite: Suite, curves: pd.DataFrame, finals: pd.DataFrame) -> list[str]:
    """
    :param suite: the suite
    :param curves: evaluations during the trainings
    :param finals: final evaluations
    :return: what the trained policies reach: one table of all, and one per environment with its seeds
    """
    env_ids = list(finals["env"].unique())
    algos = list(finals["algo"].unique())
    n_episodes = len(finals["episodes"].iloc[0])
    means = finals.groupby(["algo", "env"])["return"].agg(["mean", "min"])
    best = finals.groupby(["env", "algo"])["return"].mean().groupby("env").max()
    overview = {}
    for algo in algos:
        cells = []
        for env_id in env_ids:
            if (algo, env_id) not in means.index:
                cells.append("")
                continue
            mean, lowest = means.loc[(algo, env_id)]
            bold = "**" if mean == best[env_id] else ""
            cells.append(f"{bold}{mean:,.1f}{bold} ({lowest:,.1f})")
        overview[algo] = cells
    text = [
        "## Final returns",
        f"Greedy, {n_episodes} episodes after the training: mean over the seeds, in brackets the worst seed.",
        markdown_table(["", *env_ids], overview),
        f"By environment, also the mean of the last {N_LAST} evaluations (in brackets that of each seed). Minutes and "
        "rates are those of the clock, and depend on what else ran on the machine; minutes of the processor (means of "
        "the seeds where they were measured) do so less.",
    ]
    for env_id in env_ids:
        rows = {}
        for algo, group in finals[finals["env"] == env_id].groupby("algo", sort=False):
            minutes = group["seconds"].mean() / 60
            cpu_minutes = group["cpu_seconds"].mean() / 60
            of_group = (curves["env"] == env_id) & (curves["algo"] == algo) & curves["seed"].isin(group["seed"])
            last = curves[of_group].sort_values("step").groupby("seed").tail(N_LAST).groupby("seed")["return"].mean()
            rows[algo] = [
                ", ".join(f"{value:,.1f}" for value in group.sort_values("seed")["return"]),
                f"{group['return'].mean():,.1f}",
                f"{group['return'].min():,.1f}",
                f"{last.mean():,.1f} ({', '.join(f'{value:,.1f}' for value in last)})",
                f"{group['step'].max():,}",
                f"{minutes:,.1f}",
                "" if np.isnan(cpu_minutes) else f"{cpu_minutes:,.1f}",
                f"{group['step'].mean() / (60 * minutes):,.0f}",
            ]
        for algo, value in suite.envs[env_id].published.items():
            rows[f"{label(algo)}, published"] = ["", f"{value:,.0f}", "", "", f"{suite.published_steps:,}", "", "", ""]
        columns = [
            "",
            "each seed",
            "mean",
            "worst seed",
            f"last {N_LAST}",
            "steps",
            "minutes",
            "of the processor",
            "steps/s",
        ]
        text += [f"### {env_id}", markdown_table(columns, rows)]
    if any(suite.envs[env_id].published for env_id in env_ids):
        text.append(f"Published: {suite.published_source}.")
    return text


def aggregate_section(finals: pd.DataFrame, folder: Path) -> list[str]:
    """
    :param finals: final evaluations
    :param folder: where the figure goes
    :return: interquartile means and performance profiles over all environments that all algorithms were trained on
    """
    scores = score_matrices(finals)
    if not scores:
        return []
    thresholds = np.linspace(0.0, max(1.0, max(matrix.max() for matrix in scores.values())), 51)
    means = statistics.bootstrap(scores, statistics.interquartile_mean, n_resamples=10_000)
    profiles = statistics.bootstrap(scores, lambda matrix: statistics.performance_profile(matrix, thresholds))
    save(plot_aggregates(means, profiles, thresholds), folder / "aggregate.png")
    rows = {
        algo: [
            f"{mean[0]:.3f}",
            f"{low[0]:.3f} to {high[0]:.3f}",
            str(len(scores[algo])),
        ]
        for algo, (mean, (low, high)) in means.items()
    }
    n_envs = next(iter(scores.values())).shape[1]
    return [
        "## All environments together",
        f"Final returns as scores (0: random actions, 1: the environment's reference, see `suites.yml`) over {n_envs} "
        f"environment(s) with at least {MIN_RUNS} seeds, for algorithms with complete trainings on all of them by at "
        "least as many, which are those that count. 95% intervals by stratified bootstrap (rliable).",
        markdown_table(["", "interquartile mean score", "95% interval", "seeds"], rows),
        "![Interquartile mean scores and performance profiles](aggregate.png)",
    ]


def score_matrices(finals: pd.DataFrame) -> dict[str, np.ndarray]:
    """
    :param finals: final evaluations
    :return: by algorithm with at least ``MIN_RUNS`` seeds that are complete in all environments, their scores, shape
        (seeds, environments); an environment with fewer seeds of every algorithm is only a first look, and left out
    """
    n_seeds = finals.groupby("env")["seed"].nunique()
    finals = finals[finals["env"].map(n_seeds) >= MIN_RUNS]
    n_envs = finals["env"].nunique()
    scores = {}
    for algo, group in finals.groupby("algo", sort=False):
        matrix = group.pivot(index="seed", columns="env", values="score").dropna()
        if matrix.shape[1] == n_envs and len(matrix) >= MIN_RUNS:
            scores[algo] = matrix.to_numpy()
    return scores


def plot_aggregates(
    means: Mapping[str, tuple[np.ndarray, np.ndarray]],
    profiles: Mapping[str, tuple[np.ndarray, np.ndarray]],
    thresholds: np.ndarray,
) -> Figure:
    """
    :param means: interquartile means with intervals by algorithm
    :param profiles: performance profiles with intervals by algorithm
    :param thresholds: the scores at which the profiles are taken
    :return: the figure
    """
    colors, dashes = styles(means)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    for position, (algo, (mean, (low, high))) in enumerate(means.items()):
        left.barh(position, high - low, left=low, height=0.6, color=colors[algo], alpha=0.45)
        left.vlines(mean, position - 0.3, position + 0.3, color=colors[algo], linewidth=4)
    left.set_yticks(range(len(means)), list(means))
    left.invert_yaxis()
    left.set_xlim(left=min(0.0, *(low[0] for _, (low, _) in means.values())))
    left.set(title="Interquartile mean of final scores", xlabel="score (0: random, 1: reference)")
    for algo, (shares, (low, high)) in profiles.items():
        right.plot(thresholds, shares, color=colors[algo], dashes=dashes[algo] or (1, 0), linewidth=2, label=algo)
        right.fill_between(thresholds, low, high, color=colors[algo], alpha=0.15, linewidth=0)
    right.set(title="Performance profiles", xlabel="score s", ylabel="share of runs with a final score above s")
    right.set_ylim(-0.02, 1.02)
    share_legend(figure, [left, right])
    return figure


def stability_section(curves: pd.DataFrame, finals: pd.DataFrame, folder: Path) -> list[str]:
    """
    :param curves: evaluations during the trainings
    :param finals: final evaluations, which tell the trainings that are complete
    :param folder: where the figure goes
    :return: the measures of stability, one table per environment
    """
    measures = stability_measures(curves, finals)
    save(plot_stability(measures), folder / "stability.png")
    text = [
        "## Stability",
        "After Chan et al. 2020, in scores (see above): of each measure, less is better. Dispersions are interquartile "
        "ranges, risks are the mean of the worst 5%. Across time: of the differences between successive evaluations. "
        "Short-term risk: drops between successive evaluations. Long-term risk: distance from the best so far. These "
        "three are means over the seeds. Across runs: between the seeds at each evaluation, averaged, if several. "
        "Across episodes: between the episodes of the final evaluation, mean over the seeds.",
        "![Measures of stability](stability.png)",
    ]
    for env_id, group in measures.groupby("env", sort=False):
        rows = {
            row["algo"]: ["" if np.isnan(row[name]) else f"{row[name]:.3f}" for name in STABILITY] + [str(row["seeds"])]
            for row in group.to_dict("records")
        }
        text += [f"### {env_id}", markdown_table(["", *STABILITY, "seeds"], rows)]
    return text


def stability_measures(curves: pd.DataFrame, finals: pd.DataFrame) -> pd.DataFrame:
    """
    :param curves: evaluations during the trainings
    :param finals: final evaluations, which tell the trainings that are complete
    :return: one row per environment and algorithm, with the number of seeds and a column per measure
    """
    rows = []
    for (env_id, algo), group in finals.groupby(["env", "algo"], sort=False):
        complete = curves[(curves["env"] == env_id) & (curves["algo"] == algo) & curves["seed"].isin(group["seed"])]
        # One row per seed, one column per evaluation
        matrix = complete.pivot(index="seed", columns="step", values="score").dropna(axis="columns").to_numpy()
        measures = dict(zip(STABILITY, stability(matrix, list(group["episodes"])), strict=True))
        rows.append({"env": env_id, "algo": algo, "seeds": len(matrix), **measures})
    return pd.DataFrame(rows)


def stability(curves: np.ndarray, episodes: list[np.ndarray]) -> list[float]:
    """
    :param curves: scores of the evaluations, shape (number of trainings, number of evaluations)
    :param episodes: scores of the final episodes of each training
    :return: the measures in ``STABILITY``; NaN for the dispersion across runs if there is one training only
    """
    return [
        float(np.mean([statistics.dispersion_across_time(curve) for curve in curves])),
        float(np.mean([statistics.short_term_risk(curve) for curve in curves])),
        float(np.mean([statistics.long_term_risk(curve) for curve in curves])),
        statistics.dispersion_across_runs(curves) if len(curves) > 1 else float("nan"),
        float(np.mean([statistics.dispersion_across_episodes(returns) for returns in episodes])),
    ]


def plot_stability(measures: pd.DataFrame) -> Figure:
    """
    :param measures: from :func:`stability_measures`
    :return: one panel per measure that there are values of, with all environments and algorithms
    """
    names = [name for name in STABILITY if measures[name].notna().any()]
    env_ids, algos = list(measures["env"].unique()), list(measures["algo"].unique())
    size = (3.2 * len(names), 1.6 + 0.22 * len(env_ids) * len(algos))
    figure, axes = plt.subplots(1, len(names), figsize=size, sharey=True)
    for ax, name in zip(axes, names, strict=True):
        sns.barplot(
            measures,
            x=name,
            y="env",
            hue="algo",
            order=env_ids,
            hue_order=algos,
            palette=styles(algos)[0],
            saturation=1,
            orient="h",
            ax=ax,
        )
        ax.set(title=name, xlabel="in scores (less is better)", ylabel="")
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(4))
    share_legend(figure, axes)
    return figure


def markdown_table(columns: list[str], rows: Mapping[str, list[str]]) -> str:
    """
    :param columns: headings, the first one that of the rows' names
    :param rows: cells by name of the row
    :return: the table
    """
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)] + [[name, *cells] for name, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
