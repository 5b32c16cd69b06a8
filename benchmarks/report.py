"""Markdown and figures, only from the result files of a suite and from what others have published."""

from collections.abc import Iterable, Iterator
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from scipy.stats import iqr

from benchmarks import figures, statistics
from benchmarks.figures import save, share_legend, text_table
from benchmarks.results import Results
from benchmarks.statistics import time_to_return
from benchmarks.suites import FOLDER, Suite, file_name

LABELS = {
    "staq": "StaQ",
    "dqn": "DQN",
    "qrdqn": "QR-DQN",
    "ppo": "PPO",
    "trpo": "TRPO",
    "sac": "SAC",
    "staq_last": "StaQ, last policy",
    "staq_additive": "StaQ, additive critics",
    "tqc": "TQC",
    "crossq": "CrossQ",
    "td3": "TD3",
    "staq_five": "StaQ, five episodes",
}
# Dashes are for readers who cannot see the colours
COLORS = (
    *(figures.BLUE, figures.ORANGE, figures.SKY, figures.BLACK, figures.PURPLE),
    *(figures.VERMILLION, figures.GREEN, "#999999", figures.YELLOW),
)
DASHES = (
    *("", (5, 2), (1, 1), (5, 1, 1, 1), (3, 1, 1, 1, 1, 1), (8, 2), (2, 2), (8, 1, 2, 1), (1, 3), (5, 1)),
    *((4, 1), (3, 3)),
)

# The prose, by heading
TEXTS = {part.partition("\n")[0]: part.strip() for part in (FOLDER / "report.md").read_text().split("\n## ")}
MIN_RUNS = 2  # algorithms with fewer trainings in common are not compared over all environments
N_LAST = 5  # evaluations at the end of a training whose mean is reported
TARGETS = (0.25, 0.5, 0.75, 1.0)  # scores of the returns whose time is reported

# What identifies a training
TRAINING = ["env", "algo", "seed"]
# What all trainings of an algorithm in an environment should have in common
SETTINGS = ("hyperparams_sha256", "steps", "eval_freq", "n_eval_episodes")

# The measures of stability in the order of tables and panels: those of Chan et al., and those without a unit
RISKS = {
    "across time": statistics.dispersion_across_time,
    "short-term risk": statistics.short_term_risk,
    "long-term risk": statistics.long_term_risk,
}
SHARES = {
    "relative drawdown": lambda gains: statistics.relative_drawdown(gains.mean(axis=1)),
    "resampled drawdown": statistics.resampled_drawdown,
    "low share": lambda gains: statistics.low_share(gains.mean(axis=1)),
}
STABILITY = (*RISKS, "across runs", "across episodes", *SHARES)


def label(algo: str) -> str:
    """Return what an algorithm of a suite is called in reports."""
    base, _, variant = algo.partition("_")
    return LABELS.get(algo) or (f"{label(base)}, {variant}" if variant else algo.upper())


def styles(labels: Iterable[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Return colours and dashes by label; the algorithms in ``LABELS`` look the same in all figures."""
    names = list(dict.fromkeys([*LABELS.values(), *labels]))
    return dict(zip(names, cycle(COLORS), strict=False)), dict(zip(names, cycle(DASHES), strict=False))


def load_published(path: Path = FOLDER / "published.yml") -> tuple[pd.DataFrame, str]:
    """Load what others have published, one row per algorithm, environment and number of steps; and its source."""
    contents = yaml.safe_load(path.read_text())
    return pd.DataFrame(contents["rows"], columns=contents["columns"]), contents["source"]


def write_report(suite: Suite, folder: Path) -> Path:
    """Write the report of a suite (a Markdown file) and its figures to the folder of its results."""
    published, source = load_published()
    published = published[published["env"].isin(suite.envs)]
    curves, finals = load_results(suite, folder)
    sns.set_theme(style="whitegrid", context="notebook", rc={"savefig.bbox": "tight"})
    save(plot_curves(suite, curves, published, "step", "environment steps"), folder / "curves.png")
    curves["minutes"] = curves.groupby(["env", "algo", "step"])["seconds"].transform("mean") / 60
    save(plot_curves(suite, curves, published, "minutes", "minutes of training"), folder / "wall_clock.png")
    introduction = next(iter(TEXTS.values())).format(suite=suite, summary=summary(suite, finals))
    text = [introduction, section("Learning curves", suite=suite)]
    if not published.empty:
        text.append(f"Published: {source}. A number in brackets after a name: gradient steps per environment step.")
    if not finals.empty:
        curves = curves.merge(finals[TRAINING])  # from here on, only complete trainings
        published = published.assign(asked=published["env"].map(finals.groupby("env")["asked"].max()))
        text += final_section(curves, finals, published) + time_section(suite, curves)
        text += aggregate_section(finals, folder) + stability_section(curves, finals, published, folder)
    report = folder / "report.md"
    report.write_text("\n\n".join(text) + "\n")
    return report


def section(heading: str, **values: Any) -> str:
    """Return a section of the report, with its values filled in."""
    return f"## {TEXTS[heading].format(**values)}"


def by_env(table: pd.DataFrame) -> Iterator[str]:
    """Yield a heading and a table for each environment, from rows whose index is environment and name."""
    for env_id, rows in table.groupby(level=0, sort=False):
        yield from (f"### {env_id}", text_table(rows.droplevel(0)))


def load_results(suite: Suite, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Load evaluations during the trainings, and final evaluations of complete ones; one row each."""
    rows: list[dict[str, Any]] = []
    for (env_id, env), algo in product(suite.envs.items(), suite.algos):
        found = [Results.read(path) for path in (folder / file_name(env_id) / algo).glob("seed_*.csv")]
        for results in sorted(found, key=lambda results: results.metadata["seed"]):
            metadata = results.metadata
            # In the trainings that used this package, also its version: defaults may have changed since
            version = metadata.get("versions", {}).get("sb3-staq") if algo.startswith("staq") else None
            for evaluation in results.evaluations:
                # With several environments, evaluations are a few steps late
                late = 0 if evaluation.final else evaluation.step % metadata["eval_freq"]
                row = {
                    **vars(evaluation),
                    "env": env_id,
                    "algo": label(algo),
                    "seed": metadata["seed"],
                    "asked": metadata["steps"],
                    "step": evaluation.step - late,
                    "return": evaluation.mean,
                    "score": statistics.normalise(evaluation.mean, env.random, env.reference),
                    "gains": np.array(evaluation.returns) - (env.random if env.zero is None else env.zero),
                    "episodes": statistics.normalise(np.array(evaluation.returns), env.random, env.reference),
                    "settings": (*(metadata[key] for key in SETTINGS), version),
                    "commits": metadata.get("commits", []),  # older files do not have it
                }
                rows.append(row)
    if not rows:
        raise SystemExit(f"No results in {folder}; run the suite first")
    table = pd.DataFrame(rows)
    return table[~table["final"]].copy(), table[table["final"]].copy()


def summary(suite: Suite, finals: pd.DataFrame) -> str:
    """Say how many trainings there are, and whether they can be compared."""
    lines = [f"{len(finals)} complete trainings."]
    groups = finals.groupby(["env", "algo"], sort=False)
    n_settings = groups["settings"].nunique()
    for env_id, algo in n_settings[n_settings > 1].index:
        lines.append(f"**{algo} on {env_id}: not all seeds have the same settings, evaluations and version of StaQ.**")
    for env_id, lengths in finals.groupby("env", sort=False)["asked"].unique().items():
        if len(lengths) > 1:
            lines.append(f"**{env_id}: trainings of {' and '.join(f'{n:,}' for n in sorted(lengths))} steps.**")
    missing, others = [], []
    for env_id, algo in product(suite.envs, suite.algos):
        asked = set(suite.seeds_of(algo))
        done = set(finals.loc[(finals["env"] == env_id) & (finals["algo"] == label(algo)), "seed"])
        if asked - done:
            missing.append(f"{label(algo)} on {env_id} ({len(asked & done)} of {len(asked)})")
        if done - asked:
            others.append(f"{label(algo)} on {env_id} ({', '.join(map(str, sorted(done - asked)))})")
    if missing:
        lines.append(f"Seeds that the suite asks for and that are not complete: {', '.join(missing)}.")
    if others:
        lines.append(f"Seeds that it does not ask for: {', '.join(others)}.")
    commits = finals.explode("commits").dropna(subset="commits").groupby("algo", sort=False)["commits"].unique()
    if len(commits):
        lines.append(f"Commits: {'; '.join(f'{algo} ' + ', '.join(known) for algo, known in commits.items())}.")
    return " ".join(lines)


def plot_curves(suite: Suite, curves: pd.DataFrame, published: pd.DataFrame, x: str, x_label: str) -> Figure:
    """Plot one panel per environment: mean return over ``x``, with bands over the seeds, and published returns."""
    algos = [label(algo) for algo in suite.algos if label(algo) in set(curves["algo"])]
    colors, dashes = styles(algos)
    grid = sns.relplot(
        curves,
        kind="line",
        x=x,
        y="return",
        hue="algo",
        style="algo",
        hue_order=algos,
        style_order=algos,
        palette=colors,
        dashes=dashes,
        n_boot=500,
        seed=0,
        linewidth=2,
        err_kws={"alpha": 0.15, "linewidth": 0},
        col="env",
        col_wrap=min(curves["env"].nunique(), 2 if curves["env"].nunique() == 4 else 3),
        height=3.6,
        aspect=1.3,
        facet_kws={"sharex": False, "sharey": False},
    )
    for env_id, ax in grid.axes_dict.items():
        of_env = curves[curves["env"] == env_id]
        others = published[(published["env"] == env_id) & published["algo"].isin(map(label, suite.algos))]
        for algo, group in others.groupby("algo"):
            last = group.loc[group["steps"].idxmax()]
            name = f"{algo}, published ({last['steps']:,} steps)"
            ax.axhline(last["return"], color=colors[algo], linewidth=1.5, linestyle=":", label=name)
            points = group[group["steps"] <= of_env["step"].max()]
            if x == "step" and not points.empty:
                marks = {"color": colors[algo], "markerfacecolor": "white", "label": f"{algo}, published"}
                ax.plot("steps", "return", "o", data=points, clip_on=False, zorder=3, **marks)
        if others.empty:
            ax.axhline(suite.envs[env_id].reference, color="0.4", linewidth=1, linestyle=":", label="reference")
        n_seeds = of_env.groupby("algo")["seed"].nunique()
        seeds = " to ".join(str(n) for n in sorted({n_seeds.min(), n_seeds.max()}))
        ax.set(title=f"{env_id} (seeds: {seeds})", xlabel=x_label, ylabel="return per episode")
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.xaxis.set_major_locator(MaxNLocator(6))
    grid.legend.remove()
    return share_legend(grid.figure)


def each(values: Iterable[float], number: str = "{:,.1f}") -> str:
    """Format the numbers of a group, one by one."""
    return ", ".join(map(number.format, values)).replace("nan", "-")


def final_section(curves: pd.DataFrame, finals: pd.DataFrame, published: pd.DataFrame) -> list[str]:
    """Report what the trained policies reach: one table of all, and one per environment with its seeds."""
    number = "{:,.1f}".format
    means = finals.pivot_table("return", "algo", "env", sort=False)
    lowest = finals.pivot_table("return", "algo", "env", aggfunc="min", sort=False)
    texts = means.map(number)
    texts = texts.where(means < means.max(), "**" + texts + "**") + lowest.map(" ({:,.1f})".format)
    n_episodes = len(finals["episodes"].iloc[0])
    overview = text_table(texts.where(means.notna()))
    text = [section("Final returns", n_episodes=n_episodes, overview=overview, n_last=N_LAST)]

    last = curves.groupby(TRAINING).tail(N_LAST).groupby(TRAINING)["return"].mean().rename("last")
    groups = finals.join(last, on=TRAINING).groupby(["env", "algo"], sort=False)
    minutes = groups[["seconds", "cpu_seconds"]].mean() / 60
    own = pd.DataFrame(
        {
            "each seed": groups["return"].agg(each),
            "mean": groups["return"].mean().map(number),
            "worst seed": groups["return"].min().map(number),
            f"last {N_LAST}": groups["last"].mean().map(number) + " (" + groups["last"].agg(each) + ")",
            "steps": groups["step"].max().map("{:,}".format),
            "minutes": minutes["seconds"].map(number),
            "CPU minutes": minutes["cpu_seconds"].map(number, na_action="ignore"),
            "steps/s": (groups["step"].mean() / groups["seconds"].mean()).map("{:,.0f}".format),
        }
    )
    # Published trainings as long as ours, and longer ones of the same algorithm
    known = published.set_index(["env", "algo"]).index.isin(own.index)
    steps, asked = published["steps"], published["asked"]
    published = published[(steps == asked) | (known & (steps > asked))]
    lengths = published["steps"].map("{:,}".format)
    others = pd.DataFrame(
        {
            "env": published["env"],
            "algo": published["algo"] + ", published (" + lengths + " steps)",
            "each seed": published["seeds"].map("{} seeds".format),
            "mean": published["return"].map("{:,.0f}".format),
            "steps": lengths,
        }
    )
    return [*text, *by_env(pd.concat([own, others.set_index(["env", "algo"])]))]


def time_section(suite: Suite, curves: pd.DataFrame) -> list[str]:
    """Report how long the trainings take to reach some returns, one table per environment with known CPU times."""
    text = [section("Time to a return", targets=", ".join(map(str, TARGETS)))]
    for env_id, of_env in curves.dropna(subset="cpu_seconds").groupby("env", sort=False):
        env = suite.envs[env_id]
        targets = [env.random + score * (env.reference - env.random) for score in TARGETS]
        minutes = [
            {"algo": algo, **{f"{y:,.1f}": time_to_return(x["cpu_seconds"], x["return"], y) / 60 for y in targets}}
            for (algo, _), x in of_env.groupby(["algo", "seed"], sort=False)
        ]
        groups = pd.DataFrame(minutes).groupby("algo", sort=False)
        text += [f"### {env_id}", text_table(groups.agg(median_and_share).assign(seeds=groups.size()))]
    return text if len(text) > 1 else []


def median_and_share(minutes: pd.Series) -> str:
    """Format the median if it is finite, and how many values are finite if not all are."""
    n_reached, median = np.isfinite(minutes).sum(), minutes.median()
    share = f" ({n_reached} of {len(minutes)})" if n_reached < len(minutes) else ""
    return (f"{median:,.1f}" if np.isfinite(median) else "") + share


def aggregate_section(finals: pd.DataFrame, folder: Path) -> list[str]:
    """Report interquartile means and performance profiles over all environments, see :func:`score_matrices`."""
    scores = score_matrices(finals)
    if not scores:
        return []
    from rliable import library, metrics, plot_utils  # takes seconds

    thresholds = np.linspace(0.0, max(1.0, max(matrix.max() for matrix in scores.values())), 51)
    means, intervals = statistics.bootstrap(scores, lambda x: np.array([metrics.aggregate_iqm(x)]), n_resamples=10_000)
    profiles, bands = statistics.bootstrap(scores, lambda x: library.score_distributions(x, thresholds))
    colors, dashes = styles(scores)
    with sns.plotting_context("notebook", font_scale=0.75):
        figure, ax = plot_utils.plot_interval_estimates(
            means,
            intervals,
            ["Interquartile mean of final scores"],
            algorithms=list(scores)[::-1],
            colors=colors,
            subfigure_width=8,
            row_height=0.5,
            xlabel="",
        )
        ax.set_xlabel("score (0: random, 1: reference)", fontsize="x-large")
        ax.set_xlim(left=min(0.0, *(low for (low,), _ in intervals.values())))
        save(figure, folder / "aggregate.png")
        ax = plot_utils.plot_performance_profiles(
            profiles,
            thresholds,
            bands,
            colors=colors,
            linestyles={algo: (0, dashes[algo]) if dashes[algo] else "-" for algo in scores},
            figsize=(8, 4),
            xlabel="score s",
            ylabel="share of final scores above s",
        )
        save(share_legend(ax.figure), folder / "profiles.png")
    rows = {
        algo: [f"{means[algo][0]:.3f}", f"{low:.3f} to {high:.3f}", len(scores[algo])]
        for algo, ((low,), (high,)) in intervals.items()
    }
    n_envs = next(iter(scores.values())).shape[1]
    columns = ["interquartile mean score", "95% interval", "seeds"]
    table = text_table(pd.DataFrame.from_dict(rows, orient="index", columns=columns))
    return [section("All environments together", n_envs=n_envs, min_runs=MIN_RUNS, aggregate=table)]


def score_matrices(finals: pd.DataFrame) -> dict[str, np.ndarray]:
    """
    Return scores, shape (seeds, environments), of the algorithms with ``MIN_RUNS`` complete seeds in all environments.

    Environments with fewer seeds, of all algorithms together, are only a first look, and left out.
    """
    finals = finals[finals.groupby("env")["seed"].transform("nunique") >= MIN_RUNS]
    scores = {}
    for algo, group in finals.groupby("algo", sort=False):
        matrix = group.pivot(index="seed", columns="env", values="score").dropna()
        if matrix.shape[1] == finals["env"].nunique() and len(matrix) >= MIN_RUNS:
            scores[algo] = matrix.to_numpy()
    return scores


def stability_section(curves: pd.DataFrame, finals: pd.DataFrame, published: pd.DataFrame, folder: Path) -> list[str]:
    """Report the measures of stability, one table per environment."""
    measures = stability_measures(curves, finals)
    save(plot_stability(measures), folder / "stability.png")
    published = published[published["steps"] == published["asked"]].dropna()
    rows = pd.concat([measures, published.assign(algo=published["algo"] + ", published")]).set_index(["env", "algo"])
    cells = rows[[*STABILITY, "seeds"]].astype(object)
    for name in STABILITY:
        cells[name] = rows[name].map(("{:.2f}" if name in SHARES else "{:.3f}").format, na_action="ignore")
    for name in SHARES:
        texts = rows[f"{name}, each"].map(lambda shares: f" ({each(shares, '{:.2f}')})", na_action="ignore")
        cells[name] += texts.fillna("")
    text = [section("Stability"), *by_env(cells)]
    if not published.empty:
        text.append(
            "Published trainings were evaluated at other steps and by other numbers of episodes. Falls between two "
            "evaluations do not show: of two equal trainings, the one that is evaluated less often seems steadier."
        )
    return [*text, section("Keeping the best model", n_last=N_LAST), *by_env(kept_models(curves))]


def kept_models(curves: pd.DataFrame) -> pd.DataFrame:
    """Compare the model of each evaluation with the best so far, one row per environment and algorithm."""
    rows = []
    for training, group in curves.groupby(TRAINING, sort=False):
        returns, gains = (np.array(group[name].tolist()) for name in ("returns", "gains"))
        drawdown = statistics.resampled_drawdown(gains)
        falls = [statistics.resampled_drawdown(episodes, n_resamples=20) for episodes in statistics.keep_best(gains)]
        rows.append(
            {
                **dict(zip(TRAINING, training, strict=True)),
                f"last {N_LAST}": returns[-N_LAST:].mean(),
                f"last {N_LAST}, kept": np.mean([kept[-N_LAST:].mean() for kept in statistics.keep_best(returns)]),
                "drawdown": drawdown,
                "drawdown, kept": np.nan if np.isnan(drawdown) else pd.Series(falls).mean(),
            }
        )
    groups = pd.DataFrame(rows).groupby(["env", "algo"], sort=False)
    table = pd.DataFrame(index=groups.size().index)
    for name in (f"last {N_LAST}", f"last {N_LAST}, kept"):
        table[name] = groups[name].mean().map("{:,.1f}".format) + " (" + groups[name].agg(each) + ")"
    for name in ("drawdown", "drawdown, kept"):
        table[name] = groups[name].median().map("{:.2f}".format, na_action="ignore")
    return table.assign(seeds=groups.size())


def stability_measures(curves: pd.DataFrame, finals: pd.DataFrame) -> pd.DataFrame:
    """Compute the measures of stability, one row per environment and algorithm, with the number of seeds."""
    rows = []
    for (env_id, algo), group in finals.groupby(["env", "algo"], sort=False):
        own = curves[(curves["env"] == env_id) & (curves["algo"] == algo)]
        # One row per seed, one column per evaluation
        matrices = own.pivot(index="seed", columns="step", values=["score", "gains"]).dropna(axis="columns")
        scores, gains = matrices["score"].to_numpy(float), np.array(matrices["gains"].to_numpy().tolist())
        measures = stability(scores, gains, list(group["episodes"]))
        rows.append({"env": env_id, "algo": algo, "seeds": len(scores), **measures})
    return pd.DataFrame(rows)


def stability(scores: np.ndarray, gains: np.ndarray, episodes: list[np.ndarray]) -> dict[str, Any]:
    """
    Compute the measures in ``STABILITY``, and those of each training where they are medians.

    :param scores: scores of the evaluations, shape (number of trainings, number of evaluations)
    :param gains: the returns of their episodes, counted from the return that is worth nothing; the shape has a third
        dimension, the number of episodes
    :param episodes: scores of the final episodes of each training
    :return: measures by name; NaN for the dispersion across runs if there is one training only
    """
    shares = {name: [measure(training) for training in gains] for name, measure in SHARES.items()}
    return {
        **{name: float(np.mean([measure(curve) for curve in scores])) for name, measure in RISKS.items()},
        "across runs": float(np.mean(iqr(scores, axis=0))) if len(scores) > 1 else float("nan"),
        "across episodes": float(np.mean([iqr(returns) for returns in episodes])),
        **{name: float(pd.Series(each).dropna().median()) for name, each in shares.items()},
        **{f"{name}, each": each for name, each in shares.items()},
    }


def plot_stability(measures: pd.DataFrame) -> Figure:
    """Plot one panel per measure that has values, with all environments and algorithms."""
    names = [name for name in STABILITY if measures[name].notna().any()]
    algos = list(measures["algo"].unique())
    height = 1.4 + 0.2 * measures["env"].nunique() * len(algos)
    grid = sns.catplot(
        measures.melt(["env", "algo"], names, "measure"),
        kind="bar",
        x="value",
        y="env",
        hue="algo",
        palette=styles(algos)[0],
        saturation=1,
        col="measure",
        col_wrap=4,
        height=height,
        aspect=4 / height,
        sharex=False,
    )
    for name, ax in grid.axes_dict.items():
        ax.set(title=name, ylabel="", xlabel="share (less is better)" if name in SHARES else "score (less is better)")
        ax.xaxis.set_major_locator(MaxNLocator(4))
    grid.legend.remove()
    return share_legend(grid.figure)
