"""The theory holds on tabular MDPs: rates, floors, and the references that they are measured against."""

from collections import deque

import numpy as np
import pytest
import torch as th

from benchmarks.tabular import (
    TabularStaQ,
    bound,
    convergence,
    fitted_slope,
    floor,
    linear_rate,
    measured_rate,
    run_average,
)
from benchmarks.tabular_mdps import GRID, MOVES, garnet, grid_cells, grid_world
from sb3_staq.mirror_descent import log_policy

KL_COEF, ENT_COEF = 0.4, 0.1  # beta = 0.8
BETA = 0.8


@pytest.fixture(scope="module")
def mdp():
    return garnet(range(3), n_states=10, n_actions=3, branching=3, gamma=0.9)


@pytest.fixture(scope="module")
def maze():
    return grid_world(gamma=0.95)


def test_transitions_are_distributions(mdp, maze):
    for transition in (mdp.transition, maze.transition, grid_world(0.95, slip=0.2).transition):
        assert (transition >= 0).all()
        np.testing.assert_allclose(transition.sum(dim=-1), 1.0)
    assert ((mdp.transition > 0).sum(dim=-1) == 3).all()
    assert not th.equal(mdp.reward[0], mdp.reward[1])
    # An MDP depends on its own seed alone
    th.testing.assert_close(garnet([2], 10, 3, 3, 0.9).transition[0], mdp.transition[2], rtol=0, atol=0)


def test_policy_evaluation_by_simulation():
    """Against returns of simulated episodes, entropy counted from the second step on."""
    mdp = garnet([0], n_states=4, n_actions=2, branching=2, gamma=0.8)
    rng = np.random.default_rng(0)
    log_pi = log_policy(th.as_tensor(rng.normal(size=(1, 4, 2))), (2,))
    q_values = mdp.evaluate(log_pi, ENT_COEF)[0]
    transition, reward, log_p = mdp.transition[0].numpy(), mdp.reward[0].numpy(), log_pi[0].numpy()

    n_episodes = 20_000
    state, action = np.full(n_episodes, 1), np.full(n_episodes, 0)
    returns = np.zeros(n_episodes)
    for step in range(60):
        bonus = 0.0 if step == 0 else -ENT_COEF * log_p[state, action]
        returns += 0.8**step * (reward[state, action] + bonus)
        draws = rng.random((2, n_episodes, 1))
        state = (draws[0] > transition[state, action].cumsum(axis=1)).sum(axis=1).clip(max=3)
        action = (draws[1] > np.exp(log_p[state]).cumsum(axis=1)).sum(axis=1).clip(max=1)
    assert returns.mean() == pytest.approx(q_values[1, 0].item(), abs=5 * returns.std() / n_episodes**0.5)


def test_optimal_q_values_are_a_fixed_point_and_the_best(mdp):
    """Soft policy evaluation of the softmax of Q*/ent_coef gives Q* back; no other policy has higher values."""
    optimum = mdp.optimal_q_values(ENT_COEF)
    logits = optimum / ENT_COEF
    n_actions = (mdp.n_actions,)
    np.testing.assert_allclose(mdp.evaluate(log_policy(logits, n_actions), ENT_COEF), optimum, rtol=1e-12)
    generator = th.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 10.0):
        other = logits + scale * th.randn(logits.shape, generator=generator, dtype=th.float64)
        assert (mdp.evaluate(log_policy(other, n_actions), ENT_COEF) <= optimum + 1e-12).all()


@pytest.mark.parametrize(("rule", "memory_size"), [("exact", 0), ("weight_corrected", 50), ("weight_corrected", 100)])
def test_rate_is_at_most_d(mdp, rule, memory_size):
    rate = linear_rate(KL_COEF, ENT_COEF, mdp.gamma)
    assert rate == pytest.approx(0.98)
    distances = convergence(TabularStaQ(mdp, rule, memory_size, KL_COEF, ENT_COEF), 160)
    assert (distances[:, 0] > 0.1).all()
    limit = bound(mdp, KL_COEF, ENT_COEF, 160)
    for quantity, factor in zip(distances, (mdp.gamma, 1.0), strict=True):
        assert (quantity <= factor * limit + 1e-13).all()
        for run in quantity.T:
            assert measured_rate(run) <= rate
    # Near the optimum, values are flat: the logits go with beta, and the values with its square
    if rule == "exact":
        assert measured_rate(distances[1, :, 0]) == pytest.approx(BETA, abs=0.01)
        assert measured_rate(distances[0, :, 0]) == pytest.approx(BETA**2, abs=0.05)


def test_measured_rate():
    assert measured_rate(3 * 0.7 ** np.arange(100)) == pytest.approx(0.7)
    assert np.isnan(measured_rate(1e-3 + 0.7 ** np.arange(100)))


def test_floor_of_truncation_is_proportional_to_the_deleted_weight(mdp):
    """Of the logits: to beta^M; of the values, which are flat at the optimum: to its square."""
    memory_sizes = np.array([12, 16, 20, 25, 30, 40])
    floors = [floor(TabularStaQ(mdp, "truncated", m, KL_COEF, ENT_COEF), 200) for m in memory_sizes]
    q_floors, logit_floors = np.transpose(floors)
    assert fitted_slope(BETA**memory_sizes, logit_floors) == pytest.approx(1.0, abs=0.01)
    assert fitted_slope(BETA**memory_sizes, q_floors) == pytest.approx(2.0, abs=0.05)
    np.testing.assert_allclose(logit_floors, BETA**memory_sizes, rtol=0.05)
    # A floor indeed: more iterations do not help
    longer = floor(TabularStaQ(mdp, "truncated", 12, KL_COEF, ENT_COEF), 300)
    np.testing.assert_allclose(longer, floors[0], rtol=1e-6)


@pytest.mark.parametrize("memory_size", [1, 2, 10, 40])
def test_corrected_weights_have_no_floor(mdp, memory_size):
    assert max(floor(TabularStaQ(mdp, "weight_corrected", memory_size, KL_COEF, ENT_COEF), 200)) < 1e-13


def test_custom_weights(mdp):
    """Geometric ones are the truncated rule; the newest Q-function alone over ent_coef is soft policy iteration."""
    iterations = 60
    geometric = [2.0 * BETA**age for age in range(5)]  # alpha = 1 / (0.4 + 0.1)
    for custom, rule, kl_coef in [(geometric, "truncated", KL_COEF), (lambda age: 10.0 * (age == 0), "exact", 0.0)]:
        actual, expected = (
            convergence(TabularStaQ(mdp, each, 5, kl_coef, ENT_COEF), iterations) for each in (custom, rule)
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def test_noise_shrinks_as_the_weights_say(mdp):
    """The spread of the logits when every Q-function is noise."""
    generator = th.Generator().manual_seed(0)
    for memory_size in (2, 20):
        staq = TabularStaQ(mdp, "weight_corrected", memory_size, 20.0, ENT_COEF)
        samples = []
        for _ in range(50 * memory_size):
            staq.update(th.randn(mdp.reward.shape, generator=generator, dtype=th.float64))
            samples.append(staq.scaled_logits)
        assert th.stack(samples[memory_size:]).std().item() == pytest.approx(staq.noise_gain, rel=0.1)
        # With hardly any decay: the mean of M
        assert staq.noise_gain == pytest.approx(memory_size**-0.5, rel=0.01)


def test_averaged_policy(mdp):
    """By hand: the softmax of the plain mean over ent_coef, whatever weights the rule gives the single Q-functions."""
    staq = TabularStaQ(mdp, "weight_corrected", 4, KL_COEF, ENT_COEF)
    q_values = [th.as_tensor(np.random.default_rng(seed).normal(size=mdp.reward.shape)) for seed in range(6)]
    for q in q_values:
        staq.update(q)
    exponentials = np.exp(np.mean([q.numpy() for q in q_values], axis=0) / ENT_COEF)
    expected = exponentials / exponentials.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(staq.averaged(q_values).exp(), expected, rtol=1e-10)


def test_noise_is_that_of_the_seed_and_new_at_every_update(mdp):
    """Of the stated size, and independent from update to update and from MDP to MDP."""
    staq = TabularStaQ(mdp, "weight_corrected", 4, KL_COEF, ENT_COEF)
    noise = np.array([(noisy - q).numpy() for q, noisy in staq.noisy_evaluations(300, seed=1)])
    assert noise.std() == pytest.approx(0.5, rel=0.02)
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1]) < 0.05
    again = next(TabularStaQ(mdp, "exact", 0, KL_COEF, ENT_COEF).noisy_evaluations(1, seed=1))
    np.testing.assert_allclose(again[1] - again[0], noise[0], rtol=0, atol=1e-12)


def test_the_average_gets_better_with_the_window_and_the_last_policy_does_not():
    """On MDPs and noise that the report has not seen, with little and with much KL regularisation."""
    losses = run_average(seeds=range(100, 112), windows=(1, 5, 20, 60))
    for _, rows in losses.groupby("kl_coef"):
        averaged, last = (rows.groupby("W")[policy].mean().to_numpy() for policy in ("averaged", "last"))
        assert (averaged[1:] < 0.6 * averaged[:-1]).all()
        assert last[-1] > 0.7 * last[0]
        assert averaged[-1] < 0.5 * last[-1]
        # On nearly every seed, not by a few lucky ones
        longest = rows[rows["W"] == 60]
        assert (longest["averaged"] < longest["last"]).mean() > 0.8
        # A window shorter than what the last policy averages over is worse
        assert averaged[0] > 1.2 * last[0]


def steps_to_goal(grid):
    """Breadth-first search from the goal on the map's text."""
    rows = grid.strip().splitlines()
    goal = next((i, row.index("G")) for i, row in enumerate(rows) if "G" in row)
    steps, queue = {goal: 0}, deque([goal])
    while queue:
        i, j = queue.popleft()
        for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            inside = 0 <= cell[0] < len(rows) and 0 <= cell[1] < len(rows[0])
            if inside and rows[cell[0]][cell[1]] != "#" and cell not in steps:
                steps[cell] = steps[i, j] + 1
                queue.append(cell)
    return steps


@pytest.mark.parametrize(("rule", "memory_size"), [("exact", 0), ("weight_corrected", 5)])
def test_grid_world_is_solved_by_shortest_paths(maze, rule, memory_size):
    """From every cell, and nearly all probability is on moves towards the goal."""
    staq = TabularStaQ(maze, rule, memory_size, kl_coef=0.08, ent_coef=0.02)
    for _ in range(60):
        staq.update(staq.evaluate())
    policy = staq.log_pi.exp()
    cells, steps = grid_cells(), steps_to_goal(GRID)
    assert sorted(steps) == cells
    for state, start in enumerate(cells):
        cell = start
        for _ in range(steps[start]):
            assert steps[cell] > 0, "at the goal too early: the reference is wrong"
            down, right = MOVES[policy[cells.index(cell)].argmax()]
            cell = (cell[0] + down, cell[1] + right)
        assert steps[cell] == 0
        towards = [steps.get((start[0] + down, start[1] + right), 99) < steps[start] for down, right in MOVES]
        assert steps[start] == 0 or policy[state][th.tensor(towards)].sum() > 0.999
