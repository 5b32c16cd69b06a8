"""The comparison suites: statistics against values worked out by hand, and real runs that are killed and resumed."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import matplotlib
import numpy as np
import pandas as pd
import pytest
from helpers import grow, make_model
from rl_zoo3.utils import ALGOS
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

import sb3_staq.zoo  # noqa: F401, registers StaQ and MinAtar
from benchmarks import cell as cell_module
from benchmarks import endurance, faults, report, speed, statistics
from benchmarks.__main__ import main
from benchmarks.results import Evaluation, Results
from benchmarks.runner import Job, look_up
from benchmarks.suites import Cell, Environment, Suite, file_name, load_suites, make_cells
from sb3_staq import StaQ

ROOT = Path(__file__).parents[1]
SUITES = load_suites()


# Statistics


def test_normalise() -> None:
    assert statistics.normalise(-200.0, random=-200.0, reference=-100.0) == 0.0
    np.testing.assert_allclose(statistics.normalise(np.array([-100.0, -150.0, -80.0]), -200.0, -100.0), [1.0, 0.5, 1.2])


def test_conditional_value_at_risk_is_the_mean_of_the_worst_losses() -> None:
    losses = np.arange(1.0, 41.0)[::-1]  # 40, 39, ..., 1
    assert statistics.conditional_value_at_risk(losses, alpha=0.05) == 39.5  # the worst 2 of 40
    assert statistics.conditional_value_at_risk(losses, alpha=0.06) == 39.0  # 2.4 of 40: the worst 3
    assert statistics.conditional_value_at_risk(losses, alpha=0.001) == 40.0  # at least one
    assert statistics.conditional_value_at_risk(losses, alpha=1.0) == 20.5


def test_dispersion_across_time_ignores_steady_progress() -> None:
    assert statistics.dispersion_across_time(np.array([0.0, 2.0, 4.0, 6.0, 8.0])) == 0.0
    # Differences 1, 2, 3, 4, 5: quartiles 2 and 4
    assert statistics.dispersion_across_time(np.array([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])) == 2.0


def test_short_term_risk_sees_single_drops() -> None:
    curve = np.array([0.0, 5.0, 3.0, 4.0, 1.0, 2.0])  # changes +5, -2, +1, -3, +1
    assert statistics.short_term_risk(curve) == 3.0  # the worst of 5
    assert statistics.short_term_risk(curve, alpha=0.4) == 2.5  # the worst 2
    assert statistics.short_term_risk(np.array([1.0, 2.0, 3.0])) == 0.0
    assert statistics.short_term_risk(-np.cumsum(np.arange(41.0))) == 39.5  # drops of 1 to 40: the worst 2


def test_long_term_risk_sees_slow_decline() -> None:
    curve = np.array([0.0, 5.0, 3.0, 4.0, 1.0, 2.0])  # below the best by 0, 0, 2, 1, 4, 3
    assert statistics.long_term_risk(curve) == 4.0
    assert statistics.long_term_risk(curve, alpha=0.5) == 3.0  # the worst 3: 4, 3, 2
    # Ten steps down by 1 are no short-term risk above 1, but 10 in the long term
    decline = np.arange(10.0, -1.0, -1.0)
    assert (statistics.short_term_risk(decline), statistics.long_term_risk(decline)) == (1.0, 10.0)


def test_dispersion_across_runs_and_episodes() -> None:
    # Quartiles between the five runs: 1 and 3 at the first evaluation, 10 and 30 at the second
    curves = np.array([[0.0, 40.0], [1.0, 30.0], [2.0, 20.0], [3.0, 10.0], [4.0, 0.0]])
    measures = report.stability(curves, curves[..., np.newaxis], [curves[:, 0], curves[:, 1]])
    assert measures["across runs"] == measures["across episodes"] == (2.0 + 20.0) / 2


def test_relative_drawdown_is_a_share_of_the_best() -> None:
    # Falls from 4 to 1 before the best, which is 10, and from 10 to 8
    assert statistics.relative_drawdown(np.array([2.0, 4.0, 1.0, 10.0, 8.0])) == 0.3
    assert statistics.relative_drawdown(np.array([1.0, 2.0, 4.0])) == 0.0
    assert statistics.relative_drawdown(np.array([4.0, -1.0])) == 1.25  # below what is worth nothing
    assert np.isnan(statistics.relative_drawdown(np.array([-2.0, -1.0, -3.0])))
    zero = 0.1 + 0.2 - 0.3  # is above 0 by rounding
    assert zero > 0 and np.isnan(statistics.relative_drawdown(np.array([zero, -0.2])))
    assert np.isnan(statistics.low_share(np.array([zero, -0.2])))
    for curve in np.random.default_rng(0).normal(3.0, 2.0, size=(50, 20)):
        falls = [early - late for i, early in enumerate(curve) for late in curve[i:]]
        assert statistics.relative_drawdown(curve) == pytest.approx(max(falls) / max(curve))
        assert statistics.relative_drawdown(7 * curve) == pytest.approx(max(falls) / max(curve))  # has no unit


def test_low_share_is_of_the_second_half() -> None:
    # The best is 8: of 8, 5, 6 and 2, two are below 6
    assert statistics.low_share(np.array([0.0, 1.0, 2.0, 3.0, 8.0, 5.0, 6.0, 2.0])) == 0.5
    assert statistics.low_share(np.array([8.0, 1.0, 2.0, 3.0, 7.0])) == pytest.approx(2 / 3)  # the middle one counts
    assert statistics.low_share(np.array([4.0, 4.0, 3.0, 1.0]), level=0.1) == 0.0
    assert np.isnan(statistics.low_share(np.array([-2.0, -1.0, 0.0])))
    for curve in np.random.default_rng(1).normal(3.0, 2.0, size=(50, 20)):
        low = sum(value / max(curve) < 0.75 for value in curve.tolist()[10:])
        assert statistics.low_share(curve) == pytest.approx(low / 10)


def test_resampled_drawdown() -> None:
    assert statistics.resampled_drawdown(np.array([[2.0, 2.0], [1.0, 1.0], [4.0, 4.0]])) == 0.25
    # The same policy twice, 0 or 2 in each of two episodes: means of 0, 1 and 2 with probabilities 1/4, 1/2 and 1/4. It
    # falls from 2 to 1, from 2 to 0 and from 1 to 0 with 1/8, 1/16 and 1/8; from 0 to 0 (1/16) there is no drawdown
    expected = (1 / 8 * 0.5 + 1 / 16 + 1 / 8) / (15 / 16)
    assert statistics.resampled_drawdown(np.array([[0.0, 2.0]] * 2), 100_000) == pytest.approx(expected, abs=0.005)
    # It never earned anything, though half of the draws would
    assert np.isnan(statistics.resampled_drawdown(np.array([[1.0, -2.0], [-2.0, 1.0]])))


def test_keeping_the_best_model() -> None:
    # Whoever chooses: the first, the first again (an equal one does not replace it), the third, and the third again
    returns = np.array([[1.0, 1.0], [1.0, 1.0], [4.0, 4.0], [3.0, 3.0]])
    returns += np.array([0.0, 0.1])
    for kept in statistics.keep_best(returns):
        assert kept.shape == (4, 1) and np.floor(kept).ravel().tolist() == [1, 1, 4, 4]
    # Models that differ by luck only: the returns for which they are chosen would be about 1.5 too high. The episodes
    # may be stored in any order
    lucky = np.sort(np.random.default_rng(0).normal(size=(2000, 10, 4)))
    kept = [[kept[-1] for kept in statistics.keep_best(training, n_splits=10)] for training in lucky]
    assert np.mean(kept) == pytest.approx(0, abs=0.03)


def test_time_to_return_is_that_of_the_first_evaluation_to_reach_it() -> None:
    times, returns = np.array([10.0, 20.0, 30.0, 40.0]), np.array([1.0, 5.0, 3.0, 8.0])
    targets = (0.0, 1.0, 3.0, 5.0, 5.1, 8.1)
    reached = [statistics.time_to_return(times, returns, target) for target in targets]
    assert reached == [10.0, 10.0, 20.0, 20.0, 40.0, float("inf")]


def test_stability_in_the_order_of_its_table() -> None:
    curves = np.array([[0.0, 5.0, 3.0, 4.0, 1.0, 2.0]] * 3)
    gains = np.stack([curves[0], [1.0, 2.0, 3.0, 4.0, 5.0, 4.5], [4.0, 5.0, 4.0, 5.0, 3.5, 5.0], -curves[0]])
    measures = report.stability(curves, gains[..., np.newaxis], [np.array([0.0, 1.0, 2.0, 3.0, 4.0])] * 3)
    # Differences 5, -2, 1, -3, 1: quartiles -2 and 1. The best is 5: of 4, 1 and 2, two are below 3.75
    assert {name: measures[name] for name in report.STABILITY} == pytest.approx(
        {
            "across time": 3.0,
            "short-term risk": 3.0,
            "long-term risk": 4.0,
            "across runs": 0.0,
            "across episodes": 2.0,
            "relative drawdown": 0.3,
            "resampled drawdown": 0.3,  # of single episodes
            "low share": 1 / 3,
        }
    )
    np.testing.assert_allclose(measures["relative drawdown, each"], [0.8, 0.1, 0.3, np.nan])
    np.testing.assert_allclose(measures["low share, each"], [2 / 3, 0.0, 1 / 3, np.nan])
    alone = report.stability(curves[:1], -curves[:1, :, np.newaxis], [np.zeros(2)])
    assert np.isnan(alone["across runs"])  # one training says nothing of how several differ
    assert np.isnan(alone["relative drawdown"]) and np.isnan(alone["low share"])


def test_bootstrap_intervals() -> None:
    pytest.importorskip("rliable")

    def mean(scores: np.ndarray) -> np.ndarray:
        return np.array([scores.mean()])

    # Strata without spread: whatever is drawn within an environment, the mean is the same
    certain = np.array([[0.0, 1.0]] * 4)
    # Two runs, 0 and 1: the mean of two draws is 0, 0.5 or 1 with probabilities 1/4, 1/2, 1/4
    uncertain = np.array([[0.0], [1.0]])
    points, intervals = statistics.bootstrap({"certain": certain, "uncertain": uncertain}, mean, n_resamples=500)
    assert points["certain"] == 0.5 and (intervals["certain"] == 0.5).all()
    assert points["uncertain"] == 0.5 and intervals["uncertain"].ravel().tolist() == [0.0, 1.0]

    # The same results give the same intervals, and who draws random numbers beside does not notice
    scores = {"some": np.random.default_rng(0).normal(size=(5, 3))}
    np.random.seed(1)
    _, first = statistics.bootstrap(scores, mean, n_resamples=200)
    number = np.random.rand()
    _, second = statistics.bootstrap(scores, mean, n_resamples=200)
    assert first["some"].tolist() == second["some"].tolist()
    np.random.seed(1)
    assert np.random.rand() == number


# Suites


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_suites_are_valid(suite: Suite) -> None:
    assert {cell.zoo_algo for cell in make_cells(suite)} <= set(ALGOS) and set(suite.algos) <= set(report.LABELS)
    assert set(suite.hyperparams) | set(suite.seeds_by_algo) <= set(suite.algos)
    for seeds in (suite.seeds_of(algo) for algo in suite.algos):
        assert len(set(seeds)) == len(seeds) != 1
    published, source = report.load_published()
    assert source
    for env_id, env in suite.envs.items():
        assert env.steps % env.eval_freq == 0 and env.steps // env.eval_freq >= 8
        assert env.random < env.reference
        others = published[(published["env"] == env_id) & (published["steps"] == 1_000_000)].set_index("algo")
        # What is published is measured from 0, and SAC's return is the reference
        assert others.empty or (env.zero, env.reference) == (0, others.loc["SAC", "return"])


def test_published_curves() -> None:
    """Numbers of their kind, one for each algorithm, environment and number of steps."""
    published, _ = report.load_published()
    counts = published.groupby(["algo", "steps"])["env"].nunique().unstack()
    assert counts.shape == (7, 3) and list(counts.columns) == [100_000, 200_000, 1_000_000] and (counts == 5).all(None)
    assert not published.duplicated(["algo", "env", "steps"]).any() and (published["return"] > 100).all()
    for name, longest in (("relative drawdown", 0.99), ("low share", 0.90)):
        assert published[name].dropna().between(0, longest).all() and published[name].max() == longest
    assert published[published["steps"] == 1_000_000].notna().all(None)


def test_the_long_suite_of_mujoco() -> None:
    suite = SUITES["mujoco_1m"]
    cells = make_cells(suite)
    assert {cell.steps for cell in cells} == {1_000_000} and {cell.eval_freq for cell in cells} == {10_000}
    seeds = {(cell.env_id, cell.algo): [] for cell in cells}
    for cell in cells:
        seeds[cell.env_id, cell.algo].append(cell.seed)
    expected = {"staq": [53, 54, 55, 56, 57], "sac": [51, 52, 53]}
    assert seeds == {(env_id, algo): expected[algo] for env_id in SUITES["mujoco"].envs for algo in expected}
    assert len(seeds) == 8
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    # Beside the shorter trainings, and --seeds is for all algorithms
    assert not {cell.results_file for cell in cells} & {cell.results_file for cell in make_cells(SUITES["mujoco"])}
    assert [cell.seed for cell in make_cells(suite, ["sac"], ["Ant-v4"], [23, 7])] == [23, 7]


def package_of(env_id: str) -> str:
    """The package that an environment needs beside Gymnasium."""
    if env_id.startswith("MinAtar/"):
        return "minatar"
    entry_point = str(gym.spec(env_id).entry_point)
    return {"box2d": "Box2D", "mujoco": "mujoco"}.get(entry_point.split(".")[2], "gymnasium")


@pytest.mark.parametrize("env_id", sorted({env_id for suite in SUITES.values() for env_id in suite.envs}))
def test_environments_can_be_made(env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo leaves a log behind
    package = package_of(env_id)
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{env_id} needs the package {package}")
    env = gym.make(env_id)
    env.reset(seed=0)
    env.close()


def test_make_cells_selects() -> None:
    cells = make_cells(SUITES["classic"], algos=["ppo"], env_ids=["CartPole-v1"], seeds=[7, 8], steps=99)
    assert [(cell.algo, cell.env_id, cell.seed, cell.steps) for cell in cells] == [
        ("ppo", "CartPole-v1", 7, 99),
        ("ppo", "CartPole-v1", 8, 99),
    ]
    n_seeds = len(SUITES["classic"].seeds)
    assert len(make_cells(SUITES["classic"])) == 6 * 4 * n_seeds
    assert len({cell.results_file for cell in make_cells(SUITES["classic"])}) == 6 * 4 * n_seeds


def test_hyperparameters_of_the_suite_replace_those_of_the_zoo() -> None:
    pytest.importorskip("minatar")
    (cell,) = make_cells(SUITES["minatar"], ["qrdqn"], ["MinAtar/Breakout-v1"], [0])
    assert cell.settings()["hyperparams"]["env_wrapper"] == "sb3_staq.minatar.MinAtarWrapper"
    assert "/" not in cell.results_file.relative_to(cell.folder / "results" / "minatar").parts[0]


def test_variants_differ_in_what_the_suite_says() -> None:
    plain, variant = (cell.settings()["hyperparams"] for cell in make_cells(SUITES["critics"], seeds=[0]))
    different = {key for key in plain.keys() | variant.keys() if plain.get(key) != variant.get(key)}
    assert different == {"critic", "policy_kwargs"}
    assert (plain["critic"], variant["critic"]) == ("joint", "additive")


def test_names_of_algorithms() -> None:
    """Variants and algorithms that the package's own suites do not have; names of the zoo with an underscore."""
    zoo_algos = {
        algo: Cell("a", "b", algo, 0, 1, 1, 1).zoo_algo for algo in ("staq", "staq_long_memory", "ppo_lstm", "a2c")
    }
    assert zoo_algos == {"staq": "staq", "staq_long_memory": "staq", "ppo_lstm": "ppo_lstm", "a2c": "a2c"}
    labels = [report.label(algo) for algo in ("staq", "staq_additive", "staq_long_memory", "a2c")]
    assert labels == ["StaQ", "StaQ, additive critics", "StaQ, long_memory", "A2C"]
    colors, dashes = report.styles(labels)
    assert set(labels) <= set(colors) == set(dashes)
    assert all(colors[name] == report.styles(["SAC"])[0][name] for name in report.LABELS.values())
    for suite in SUITES.values():  # ... and different within each of them
        names = [report.label(algo) for algo in suite.algos]
        assert len({colors[name] for name in names}) == len({dashes[name] for name in names}) == len(names)


# Result files


def test_results_survive_writing_and_reading(tmp_path: Path) -> None:
    evaluations = [Evaluation(10, 1.25, 1.0, [1.0, -2.5]), Evaluation(20, 2.5, 2.25, [3.0, 4.0, 5.0], final=True)]
    results = Results({"env": "CartPole-v1", "seed": 3, "hyperparams": {"policy": "dict(a=[1, 2])"}}, evaluations)
    results.write(tmp_path / "new" / "seed_3.csv")
    read = Results.read(tmp_path / "new" / "seed_3.csv")
    assert read == results
    assert read.done and not Results({}, evaluations[:1]).done and not Results({}).done
    table = pd.read_csv(tmp_path / "new" / "seed_3.csv", comment="#")  # as others read it
    np.testing.assert_allclose(table[["mean", "std"]], [[-0.75, 1.75], [4.0, (2 / 3) ** 0.5]], rtol=1e-5)


def fake_results(folder: Path, suite: Suite, last_seed_is_done: bool) -> None:
    """Results of all cells of a suite, as if they had been run."""
    for cell in make_cells(suite, folder=folder):
        rng = np.random.default_rng([cell.seed, len(cell.algo)])
        steps = range(cell.eval_freq, cell.steps + 1, cell.eval_freq)
        evaluations = [Evaluation(step, 0.6 * step, 0.3 * step, list(rng.normal(step, 5, 10))) for step in steps]
        if last_seed_is_done or cell.seed != suite.seeds[-1]:
            returns = list(rng.normal(cell.steps, 5, 20))
            evaluations.append(Evaluation(cell.steps, 0.6 * cell.steps, 0.3 * cell.steps, returns, True))
        common = {"steps": cell.steps, "eval_freq": cell.eval_freq, "n_eval_episodes": 10}
        metadata = {"seed": cell.seed, **common, "hyperparams_sha256": "same", "commits": [f"c{cell.seed}"]}
        Results(metadata, evaluations).write(cell.results_file)


def test_results_are_loaded_as_scores_and_gains(tmp_path: Path) -> None:
    suite = Suite("tiny", "", ["staq"], [0], 2, {"A-v0": Environment(100, 50, random=-100, reference=300, zero=50)})
    (cell,) = make_cells(suite, folder=tmp_path)
    metadata = {"seed": 0, "steps": 100, "eval_freq": 50, "n_eval_episodes": 2, "hyperparams_sha256": "same"}
    evaluations = [Evaluation(52, 1.0, 1.0, [100.0, 200.0]), Evaluation(104, 2.0, 2.0, [200.0, 300.0])]
    Results(metadata, [*evaluations, Evaluation(104, 2.0, 2.0, [0.0, 300.0], True)]).write(cell.results_file)
    curves, finals = report.load_results(suite, tmp_path / "results" / "tiny")
    rows = curves[["step", "return", "score"]].to_numpy().tolist()
    assert rows == [[50, 150, 0.625], [100, 250, 0.875]]  # 2 and 4 steps late, with several environments
    assert [gains.tolist() for gains in curves["gains"]] == [[50, 150], [150, 250]]
    assert finals["step"].tolist() == [104] and finals["episodes"].iloc[0].tolist() == [0.25, 1.0]


def table_row(text: str, section: str, env_id: str, name: str) -> dict[str, str]:
    """A row of a section's table of an environment, or of its first table, by column."""
    table = text.split(f"## {section}\n\n")[1].split(f"### {env_id}\n\n" if env_id else "\n\n|")[1]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n\n")[0].splitlines()]
    return dict(zip(lines[0], next(cells for cells in lines if cells[0] == name), strict=True))


@pytest.fixture
def three_trainings(tmp_path: Path) -> Iterator[tuple[Suite, Path]]:
    """A suite, and the folder of its results: one training is steady, one falls a little, one falls far."""
    suite = Suite("tiny", "", ["staq"], [0, 1, 2], 2, {"A-v0": Environment(80, 10, random=0, reference=100, zero=0)})
    for cell, final, fall in zip(make_cells(suite, folder=tmp_path), (10.0, 20.0, 60.0), (0.0, 0.1, 0.8), strict=True):
        returns = [20.0, 40.0, 60.0, 80.0, 100.0, 100 * (1 - fall), 100.0, 100.0]
        rows = [Evaluation(10 * i, 60.0 * i, 30.0 * i, [value] * 2) for i, value in enumerate(returns, 1)]
        metadata = dict(seed=cell.seed, steps=80, eval_freq=10, n_eval_episodes=2, hyperparams_sha256="same")
        Results(metadata, [*rows, Evaluation(80, 480.0, 240.0, [final] * 2, True)]).write(cell.results_file)
    with matplotlib.rc_context():  # reports have a theme of their own, other tests' figures have not
        yield suite, tmp_path / "results" / "tiny"


def nothing_published() -> pd.DataFrame:
    return report.load_published()[0].iloc[:0].assign(asked=0)


def test_final_returns_of_each_seed(three_trainings: tuple[Suite, Path]) -> None:
    text = "\n\n".join(report.final_section(*report.load_results(*three_trainings), nothing_published()))
    row = table_row(text, "Final returns", "A-v0", "StaQ")
    assert (row["each seed"], row["mean"], row["worst seed"]) == ("10.0, 20.0, 60.0", "30.0", "10.0")


def test_drawdowns_of_kept_models_are_medians(three_trainings: tuple[Suite, Path]) -> None:
    curves, _ = report.load_results(*three_trainings)
    row = report.kept_models(curves).loc[("A-v0", "StaQ")]
    assert (row["drawdown"], row["drawdown, kept"]) == ("0.10", "0.00")  # of 0, 0.1 and 0.8, and of three times 0


@pytest.mark.parametrize("x", ["step", "seconds"])
def test_curves_are_the_mean_returns(x: str, three_trainings: tuple[Suite, Path]) -> None:
    suite, folder = three_trainings
    curves, _ = report.load_results(suite, folder)
    (line, *_) = report.plot_curves(suite, curves, nothing_published(), x, "label").axes[0].lines
    np.testing.assert_allclose(line.get_xdata(), sorted(curves[x].unique()))
    np.testing.assert_allclose(line.get_ydata(), curves.groupby("step")["return"].mean())


def test_curves_are_drawn_over_steps_and_minutes(
    three_trainings: tuple[Suite, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[float]] = {}
    monkeypatch.setattr(report, "plot_curves", lambda suite, curves, _, x, x_label: drawn.update({x: list(curves[x])}))
    for name in ("save", "stability_section", "aggregate_section"):
        monkeypatch.setattr(report, name, lambda *args: [])
    report.write_report(*three_trainings)
    assert drawn == {"step": [*range(10, 81, 10)] * 3, "minutes": [*range(1, 9)] * 3}  # by the clock, not the processor


def test_intervals_are_around_the_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rliable")
    bootstrap = statistics.bootstrap
    monkeypatch.setattr(statistics, "bootstrap", lambda scores, function, **_: bootstrap(scores, function, 200))
    monkeypatch.setattr(report, "save", lambda *args: None)
    rows = [
        (env_id, "StaQ", seed, seed + bonus) for env_id, bonus in (("A-v0", 0.0), ("B-v0", 0.1)) for seed in range(3)
    ]
    (text,) = report.aggregate_section(pd.DataFrame(rows, columns=["env", "algo", "seed", "score"]), tmp_path)
    row = table_row(text, "All environments together", "", "StaQ")
    low, high = map(float, row["95% interval"].split(" to "))
    assert low < float(row["interquartile mean score"]) < high


@pytest.mark.slow
def test_report_is_written_from_the_results_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rliable")
    envs = {
        "CartPole-v1": Environment(80, 10, -40, 80),
        "MinAtar/Breakout-v1": Environment(80, 20, -36, 84),
    }
    suite = Suite("tiny", "Made up.", ["staq", "sac"], [0, 1, 2], 10, envs, seeds_by_algo={"sac": [0, 1]})
    columns = ["algo", "env", "seeds", "steps", "return", "relative drawdown", "low share"]
    others = pd.DataFrame(
        [
            ["SAC", "MinAtar/Breakout-v1", 10, 40, 555, 0.1, 0.2],  # of shorter trainings: in the figure only
            ["SAC", "MinAtar/Breakout-v1", 10, 80, 77, 0.31, 0.42],
            ["SAC", "MinAtar/Breakout-v1", 10, 5000, 1234, 0.5, 0.6],
            ["Other", "MinAtar/Breakout-v1", 5, 80, 88, 0.33, 0.44],
            ["Other", "MinAtar/Breakout-v1", 5, 5000, 99, 0.7, 0.8],
            ["Other", "Elsewhere-v0", 5, 80, 4321, 0.1, 0.2],
        ],
        columns=columns,
    )
    fake_results(tmp_path, suite, last_seed_is_done=False)
    folder = tmp_path / "results" / "tiny"
    with monkeypatch.context() as patch:
        patch.setattr(report, "load_published", lambda: (others, "somewhere"))
        text = report.write_report(suite, folder).read_text()
    assert "8 complete trainings" in text and "StaQ on CartPole-v1 (2 of 3)" in text
    assert "SAC on CartPole-v1" not in text and "does not ask for" not in text
    assert "Commits: StaQ c0, c1; SAC c0, c1." in text
    assert "Published: somewhere." in text and not {"555", "4,321", "99"} & {cell.strip() for cell in text.split("|")}
    row = table_row(text, "Final returns", "MinAtar/Breakout-v1", "SAC, published (5,000 steps)")
    assert (row["each seed"], row["mean"], row["steps"]) == ("10 seeds", "1,234", "5,000")
    assert table_row(text, "Final returns", "MinAtar/Breakout-v1", "Other, published (80 steps)")["mean"] == "88"
    for name, shares in (("SAC", ("0.31", "0.42", "10")), ("Other", ("0.33", "0.44", "5"))):
        row = table_row(text, "Stability", "MinAtar/Breakout-v1", f"{name}, published")
        assert (row["relative drawdown"], row["low share"], row["seeds"]) == shares and row["across time"] == ""
    for figure in ("curves.png", "wall_clock.png", "aggregate.png", "profiles.png", "stability.png"):
        assert figure in text and (folder / figure).stat().st_size > 10_000
    _, finals = report.load_results(suite, folder)
    scores = report.score_matrices(finals)
    assert list(scores) == ["StaQ", "SAC"] and scores["SAC"].shape == (2, 2)
    np.testing.assert_allclose(scores["SAC"], 1.0, atol=0.1)
    for algo, matrix in scores.items():  # of four scores, the middle half is two
        row = table_row(text, "All environments together", "", algo)
        assert row["interquartile mean score"] == f"{np.sort(matrix.ravel())[1:3].mean():.3f}" and row["seeds"] == "2"
    first_look = finals[(finals["seed"] == 0) & (finals["env"] == finals["env"].iloc[0])].assign(env="Other-v0")
    with_it = report.score_matrices(pd.concat([finals, first_look]))
    assert {algo: matrix.tolist() for algo, matrix in with_it.items()} == {a: m.tolist() for a, m in scores.items()}

    # The same numbers by another way: from the files
    for env_id in envs:
        finals_of = {
            algo: [
                Results.read(folder / file_name(env_id) / algo / f"seed_{seed}.csv").evaluations[-1].mean
                for seed in (0, 1)
            ]
            for algo in suite.algos
        }
        best = max(finals_of, key=lambda algo: np.mean(finals_of[algo]))
        for algo, values in finals_of.items():
            bold = "**" if algo == best else ""
            cell = table_row(text, "Final returns", "", report.label(algo))[env_id]
            assert cell == f"{bold}{np.mean(values):,.1f}{bold} ({min(values):,.1f})"

    # Returns rise with the steps, which take 0.3 seconds of the processor each; 84 is not reached
    row = table_row(text, "Time to a return", "MinAtar/Breakout-v1", "StaQ")
    assert row == {"": "StaQ", "-6.0": "0.1", "24.0": "0.2", "54.0": "0.3", "84.0": "(0 of 2)", "seeds": "2"}
    assert table_row(text, "Stability", "MinAtar/Breakout-v1", "StaQ")["seeds"] == "2"

    # The last evaluations are the best ones, so keeping the best changes little: half of the episodes tell the return
    row = table_row(text, "Keeping the best model", "CartPole-v1", "StaQ")
    assert row["last 5"] == table_row(text, "Final returns", "CartPole-v1", "StaQ")["last 5"]
    last, kept = (float(row[name].partition(" ")[0]) for name in ("last 5", "last 5, kept"))
    assert kept == pytest.approx(last, abs=1)
    assert row["drawdown"] == table_row(text, "Stability", "CartPole-v1", "StaQ")["resampled drawdown"][:4]
    assert (row["drawdown, kept"], row["seeds"]) == ("0.00", "2")

    # The last five evaluations of the two complete trainings, of eight each, and the time that their files state
    last = table_row(text, "Final returns", "CartPole-v1", "StaQ")
    files = [folder / "CartPole-v1" / "staq" / f"seed_{seed}.csv" for seed in (0, 1)]
    means = [np.mean([evaluation.mean for evaluation in Results.read(file).evaluations[3:8]]) for file in files]
    assert last["last 5"] == f"{np.mean(means):,.1f} ({means[0]:,.1f}, {means[1]:,.1f})"
    assert [last[name] for name in ("steps", "minutes", "CPU minutes", "steps/s")] == ["80", "0.8", "0.4", "2"]
    for file, expected in zip(files, ("0.4", ""), strict=True):  # where one file, both files are older
        file.write_text(file.read_text().replace("cpu_seconds", "unknown"))
        text = report.write_report(suite, folder).read_text()
        assert table_row(text, "Final returns", "CartPole-v1", "StaQ")["CPU minutes"] == expected
    assert "StaQ" not in text.split("## Time to a return")[1].split("### CartPole-v1")[1].split("###")[0]

    # What does not belong together
    assert "**" not in report.summary(suite, finals)
    file = folder / "CartPole-v1" / "sac" / "seed_1.csv"
    file.write_text(file.read_text().replace("# steps: 80", "# steps: 400"))
    summary = report.summary(suite, report.load_results(suite, folder)[1])
    assert (
        "**SAC on CartPole-v1: not all seeds" in summary
        and "**CartPole-v1: trainings of 80 and 400 steps.**" in summary
    )

    for algo in ("staq", "sac"):  # another version of this package matters to StaQ only
        file = folder / "MinAtar-Breakout-v1" / algo / "seed_1.csv"
        assert "# versions" not in file.read_text()
        file.write_text(file.read_text().replace("# steps: 80", '# steps: 80\n# versions: {"sb3-staq": "0.0.1"}'))
    summary = report.summary(suite, report.load_results(suite, folder)[1])
    assert "**StaQ on MinAtar/Breakout-v1: not all seeds" in summary and "**SAC on MinAtar" not in summary

    fewer = replace(suite, seeds=[1, 2])
    assert "does not ask for: StaQ on CartPole-v1 (0)" in report.summary(fewer, finals)
    assert "StaQ on CartPole-v1 (1 of 2)" in report.summary(fewer, finals)

    # Without any complete training there are curves at least
    for path in folder.glob("*/*/seed_[01].csv"):
        path.unlink()
    assert "Final returns" not in report.write_report(suite, folder).read_text()


def test_median_of_those_that_reach_a_return() -> None:
    minutes = [[1.0, 3.0], [1.0, 2.0, np.inf], [1.0, np.inf, np.inf], [np.inf]]
    texts = [report.median_and_share(pd.Series(each)) for each in minutes]
    assert texts == ["2.0", "2.0 (2 of 3)", " (1 of 3)", " (0 of 1)"]


# Runs


@pytest.mark.slow
@pytest.mark.parametrize("has_compiler", [True, False])
def test_fused_loss_of_qrdqn_is_its_loss(has_compiler: bool, tmp_path: Path) -> None:
    """In a process of its own, as a compiler is looked for once. Without one, QR-DQN trains with the loss as it is."""
    if has_compiler and not shutil.which("g++"):
        pytest.skip("there is no C++ compiler")
    code = """
import torch as th
from sb3_contrib import QRDQN
from sb3_contrib.common.utils import quantile_huber_loss
from sb3_contrib.qrdqn import qrdqn
from benchmarks.cell import fuse_quantile_loss

def train():
    model = QRDQN("MlpPolicy", "CartPole-v1", learning_starts=100, policy_kwargs=dict(n_quantiles=30), seed=0)
    model.learn(200)
    return model.policy.state_dict()

before = train()
fuse_quantile_loss()
assert qrdqn.quantile_huber_loss is not quantile_huber_loss
for name, value in train().items():
    th.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-6)
current, target = th.randn(16, 170, requires_grad=True), 3 * th.randn(16, 170)
losses = [loss(current, target, sum_over_quantiles=True) for loss in (qrdqn.quantile_huber_loss, quantile_huber_loss)]
th.testing.assert_close(*losses)
th.testing.assert_close(*(th.autograd.grad(loss, current)[0] for loss in losses))
"""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    if not has_compiler:
        environment["CXX"] = "/nonexistent"
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert ("InvalidCxxCompiler" in finished.stderr) == (not has_compiler), finished.stderr


def test_evaluations_are_greedy_episodes_of_the_next_seeds() -> None:
    """By plain Gymnasium, episode by episode, with the statistics of the training."""
    env = VecNormalize(make_vec_env("CartPole-v1", 1))
    model = make_model(env)
    grow(model, 3)
    env.obs_rms.mean, env.obs_rms.var = np.full(4, 0.05), np.full(4, 0.01)
    single, expected = gym.make("CartPole-v1"), []
    for seed in range(7, 12):
        (obs, _), total, done = single.reset(seed=seed), 0.0, False
        while not done:
            action, _ = model.predict(env.normalize_obs(obs), deterministic=True)
            obs, reward, terminated, truncated, _ = single.step(int(action))
            total, done = total + float(reward), terminated or truncated
        expected.append(total)
    eval_env = VecNormalize(make_vec_env("CartPole-v1", 5), training=False, norm_reward=False)
    for _ in range(2):  # the second time, the environments have been used
        assert sorted(cell_module.evaluate(model, eval_env, seed=7)) == sorted(expected)


def test_evaluations_have_their_own_seeds_and_take_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of `train` takes two seconds by the clock, and one of the processor."""
    clock, seeds, train = SimpleNamespace(wall=0.0, cpu=0.0), [], StaQ.train
    functions = SimpleNamespace(perf_counter=lambda: clock.wall, process_time=lambda: clock.cpu)
    monkeypatch.setattr(cell_module, "time", functions)

    def pass_time(wall: float, cpu: float) -> None:
        clock.wall, clock.cpu = clock.wall + wall, clock.cpu + cpu

    def evaluate(model: StaQ, env: VecNormalize, seed: int) -> list[float]:
        pass_time(1e6, 1e6)
        seeds.append(seed)
        return [1.0, 2.0]

    def slow_train(self: StaQ, *args: int, **kwargs: int) -> None:
        pass_time(2, 1)
        train(self, *args, **kwargs)

    monkeypatch.setattr(cell_module, "evaluate", evaluate)
    monkeypatch.setattr(StaQ, "train", slow_train)
    cell = Cell("tiny", "CartPole-v1", "staq", 7, 300, 100, 2, {"learning_starts": 100}, tmp_path)
    cell_module.run_cell(cell, lambda *progress: None)
    rows = Results.read(cell.results_file).evaluations
    assert all(row.seconds == 2 * row.cpu_seconds for row in rows) and 0 < rows[-1].seconds < 1e6
    assert seeds == [cell_module.EVAL_SEED] * 3 + [cell_module.FINAL_EVAL_SEED]
    assert cell.manager().seed == 7  # that of the training


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def but_for_times(path: Path) -> list[Evaluation]:
    """The evaluations of a result file without what differs between two runs."""
    return [replace(row, seconds=0.0, cpu_seconds=0.0) for row in Results.read(path).evaluations]


TINY_OFF_POLICY = dict(learning_starts=100, batch_size=16, buffer_size=1000, train_freq=1, gradient_steps=1)
TINY_OFF_POLICY["policy_kwargs"] = "dict(net_arch=[8])"
TINY_ON_POLICY = dict(n_envs=2, n_steps=64, batch_size=32)


@pytest.mark.parametrize(
    "algo, env_id, hyperparams",
    [
        ("staq", "CartPole-v1", {}),
        ("trpo", "CartPole-v1", TINY_ON_POLICY),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("staq", "Pendulum-v1", {"learning_starts": 100, "policy_kwargs": "dict(net_arch=[8])"}),
                ("staq", "Hopper-v4", {"learning_starts": 100}),
                ("sac", "Pendulum-v1", TINY_OFF_POLICY),
                ("td3", "Pendulum-v1", TINY_OFF_POLICY),
                ("dqn", "CartPole-v1", TINY_OFF_POLICY),
                ("qrdqn", "CartPole-v1", {**TINY_OFF_POLICY, "policy_kwargs": "dict(net_arch=[8], n_quantiles=5)"}),
                ("ppo", "MountainCar-v0", TINY_ON_POLICY),  # with VecNormalize
            ]
        ),
    ],
)
def test_training_goes_on_as_if_nothing_had_been(
    algo: str, env_id: str, hyperparams: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted twice, not at a checkpoint, and moved: the same evaluations, once, and a clock that goes on."""
    monkeypatch.chdir(tmp_path)  # MuJoCo leaves a log behind
    cell = Cell("tiny", env_id, algo, 1, 700, 128, 2, hyperparams, tmp_path / "interrupted")
    lived = replace(cell, folder=tmp_path / "lived")
    cell_module.run_cell(lived, lambda *progress: None)
    monkeypatch.setattr(cell_module, "commit", lambda: "first")

    for at in (256, 512):
        evaluated_at = []

        def interrupt(step: int, seconds: float, last_return: float | None, at: int = at, seen=evaluated_at) -> None:
            seen.append(step)
            if step >= at:
                raise Interrupted

        with pytest.raises(Interrupted):
            cell_module.run_cell(cell, interrupt)
        assert not Results.read(cell.results_file).done
    assert evaluated_at[0] > 128  # it went on from a checkpoint
    cell.folder.rename(tmp_path / "moved")
    monkeypatch.setattr(cell_module, "commit", lambda: "second")
    cell = replace(cell, folder=tmp_path / "moved")
    reports: list[tuple] = []
    cell_module.run_cell(cell, lambda *progress: reports.append(progress))
    assert but_for_times(cell.results_file) == but_for_times(lived.results_file)

    evaluations = Results.read(cell.results_file).evaluations
    assert evaluations[-1].final and len(evaluations[-1].returns) == cell_module.N_FINAL_EPISODES
    assert [row.step // 128 for row in evaluations[:-1]] == [1, 2, 3, 4, 5]
    assert [row.seconds for row in evaluations] == sorted(row.seconds for row in evaluations)
    assert reports[-1][0] == evaluations[-1].step and reports[0][0] > 384
    assert not list(cell.working_folder.glob("checkpoints*"))  # they are large
    assert list(cell.working_folder.glob(f"zoo/*/*/{file_name(env_id)}.zip"))
    assert Results.read(cell.results_file).metadata["commits"] == ["first", "second"]


@pytest.mark.slow
def test_trained_model_can_be_watched(tmp_path: Path) -> None:
    cell = Cell("tiny", "CartPole-v1", "staq", 1, 300, 150, 2, {}, tmp_path)
    cell_module.run_cell(cell, lambda *progress: None)
    options = f"--algo staq --env CartPole-v1 -f {cell.working_folder}/zoo --no-render -n 100"
    command = [sys.executable, "-m", "sb3_staq.zoo", "enjoy", *options.split()]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "Loading" in finished.stdout


def test_line_of_a_job() -> None:
    cell = Cell("tiny", "CartPole-v1", "staq", 3, 1000, 100, 2)
    assert str(Job(cell)) == "CartPole-v1 staq 3 waiting 0 / 1,000"
    job = Job(cell, "running", step=400, seconds=2.0, last_return=9.26)
    assert str(job) == "CartPole-v1 staq 3 running 400 / 1,000 200/s 9.3 0:00:03"


def test_settings_decide_whether_results_are_kept(tmp_path: Path) -> None:
    cell = Cell("tiny", "CartPole-v1", "dqn", 0, 100, eval_freq=50, n_eval_episodes=2, folder=tmp_path)
    assert look_up(cell, fresh=False).state == "waiting"
    Results(cell.settings(), [Evaluation(100, 1.0, 1.0, [9.0], final=True)]).write(cell.results_file)
    job = look_up(cell, fresh=True)
    assert (job.state, job.step, job.last_return) == ("done", 100, 9.0)

    reports: list[tuple] = []
    before = cell.results_file.read_bytes()
    cell_module.run_cell(cell, lambda *progress: reports.append(progress))  # as another process had done it meanwhile
    assert cell.results_file.read_bytes() == before and not reports

    longer = Cell("tiny", "CartPole-v1", "dqn", 0, 200, eval_freq=50, n_eval_episodes=2, folder=tmp_path)
    job = look_up(longer, fresh=False)
    assert job.state == "outdated" and "steps" in job.error and longer.results_file.exists()
    assert look_up(longer, fresh=True).state == "waiting" and not longer.results_file.exists()

    cell.results_file.write_text("not a header\n")
    assert look_up(cell, fresh=False).state == "failed"


def test_checkpoints_of_other_settings_are_not_continued(tmp_path: Path) -> None:
    """... when the results that told the settings have been deleted."""
    cell = Cell("tiny", "CartPole-v1", "dqn", 0, 400, eval_freq=200, n_eval_episodes=2, folder=tmp_path)
    other = replace(cell, hyperparams={"policy_kwargs": "dict(net_arch=[7])", "train_freq": 4, "gradient_steps": 1})

    def interrupt(step: int, *progress: float | None) -> None:
        if step >= 200:
            raise Interrupted

    with pytest.raises(Interrupted):
        cell_module.run_cell(other, interrupt)
    other.results_file.unlink()
    steps: list[int] = []
    cell_module.run_cell(cell, lambda step, *progress: steps.append(step))
    assert steps[0] < 40 and Results.read(cell.results_file).done


def test_on_policy_trainings_learn_from_all_rollouts_that_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_at: list[int] = []
    train = PPO.train

    def noted(self: PPO) -> None:
        trained_at.append(self.num_timesteps)
        train(self)

    monkeypatch.setattr(PPO, "train", noted)
    for steps in (512, 500):
        hyperparams = {"n_envs": 2, "n_steps": 128, "n_epochs": 1}
        cell = Cell("tiny", "CartPole-v1", "ppo", steps, steps, 250, 2, hyperparams, tmp_path)
        cell_module.run_cell(cell, lambda *progress: None)
        assert Results.read(cell.results_file).evaluations[-1].step == steps
    assert trained_at == [256, 512, 256]


@pytest.mark.parametrize("option", [["--jobs", "0"], ["--steps", "0"], ["--steps", "-5"], ["--steps", "7"]], ids=str)
def test_numbers_out_of_range(option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sys_argv = ["benchmarks", "run", "smoke", "--folder", str(tmp_path), *option]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr("sys.argv", sys_argv)
        main()
    assert error.value.code == 2
    assert f"{option[0]}" in (message := capsys.readouterr().err) and option[1] in message and "accepted: " in message


TINY_SUITE = """
tiny:
  description: A cell that works and one that fails.
  algos: [staq]
  seeds: [0]
  n_eval_episodes: 2
  envs:
    Missing-v0: {steps: 1200, eval_freq: 100, random: 0, reference: 1}
    CartPole-v1: {steps: 1200, eval_freq: 100, random: 20, reference: 500}
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_killed_runs_are_resumed_and_failed_cells_stop_nothing(tmp_path: Path) -> None:
    (tmp_path / "suites.yml").write_text(TINY_SUITE)
    command = [sys.executable, "-m", "benchmarks", "run", "tiny", "--suites", str(tmp_path / "suites.yml")]
    command += ["--folder", str(tmp_path), "--jobs", "2"]
    result_file = tmp_path / "results" / "tiny" / "CartPole-v1" / "staq" / "seed_0.csv"

    # Killed twice, at moments that nobody has chosen: neither the runner nor its cells have a say
    for n_evaluations in (3, 7):
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if result_file.exists() and len(Results.read(result_file).evaluations) >= n_evaluations:
                break
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert n_evaluations <= len(Results.read(result_file).evaluations) < 12

    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    suite = load_suites(tmp_path / "suites.yml")["tiny"]
    lived = make_cells(suite, env_ids=["CartPole-v1"], folder=tmp_path / "lived")[0]
    cell_module.run_cell(lived, lambda *progress: None)
    assert but_for_times(result_file) == but_for_times(lived.results_file)
    assert [row.step for row in but_for_times(result_file)] == [*range(100, 1201, 100), 1200]
    assert "Training goes on from step" in (tmp_path / "runs/tiny/CartPole-v1/staq/seed_0/log.txt").read_text()
    assert finished.returncode == 1 and "1 done, 1 failed" in finished.stdout
    assert "Missing-v0 staq seed 0 failed" in finished.stderr and "KeyError: 'Missing-v0'" in finished.stderr


# Faults


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs signals and limits of Unix")
def test_no_training_is_lost(tmp_path: Path) -> None:
    """Twenty kills and some of each other fault: what is started again ends as if nothing had been."""
    counts = {"SIGKILL": 20, "Ctrl-C": 6, **dict.fromkeys(faults.INJECTED, 2)}
    assert faults.run(tmp_path, counts, faults.TRAININGS)
    rows = pd.read_csv(tmp_path / "faults.csv").fillna("")
    assert rows.groupby("fault").size().to_dict() == counts and not rows["lost"].any()
    errors = rows.groupby("fault")["error"].unique()
    assert errors["SIGKILL"].tolist() == [""] and errors["Ctrl-C"].tolist() == ["KeyboardInterrupt"]
    assert errors["no memory in a policy update"].tolist() == ["MemoryError"]
    row = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| SIGKILL"))
    assert (row.split("|")[2].strip(), row.split("|")[4].strip()) == ("20", "0")


@pytest.mark.slow
def test_what_is_lost_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that ends otherwise than the undisturbed one, here by a digest that is none."""
    monkeypatch.setattr(faults, "undisturbed", lambda training: ("another", 1.0))
    assert not faults.run(tmp_path, {"SIGKILL": 1, "full disk": 1}, ["CartPole-v1"])
    assert pd.read_csv(tmp_path / "faults.csv")["lost"].all()


# Speed


@pytest.mark.slow
def test_speed_benchmark_runs_and_reports(tmp_path: Path) -> None:
    """Three measures and a ratio, with variants of the kernels, against this version itself: every row is there."""
    names = ["dqn gradient step", "gradient step", "act M=50, 1 row"]
    here = Path(speed.__file__).parent.parent
    path = speed.run(tmp_path, 1, 0.05, names, ["plain kernels", "no few rows"], against=here)
    rows = pd.read_csv(tmp_path / "speed.csv")
    counts = rows.groupby(["measure", "variant"]).size()
    variants = ("this version", "plain kernels", "no few rows", "other version")
    expected = {(name, variant) for name in names[1:] for variant in variants}
    assert set(counts.index) == expected | {(names[0], "this version")}
    assert (counts == 1).all() and (rows["seconds"] > 0).all()
    ratios = rows[rows.variant == "this version"].pivot(index="repetition", columns="measure", values="seconds")
    ratio = (ratios["gradient step"] / ratios["dqn gradient step"]).median()
    assert f"share of DQN's: {ratio:.2f}" in path.read_text()


# Endurance


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process as Linux tells it")
def test_long_trainings_are_measured() -> None:
    """The number of critics is that of the stack, and the cached sums are those of a direct evaluation."""
    table = endurance.run(n_updates=300)
    assert table["policy updates"].tolist() == list(range(3, 301, 3))
    assert table["frozen critics"].tolist()[:20] == list(range(3, 61, 3))
    assert table["relative drift of cached sums"].between(0, 1e-5).all()
    assert (table[["resident memory (MB)", "time per step (ms)"]] > 0).all(None)
