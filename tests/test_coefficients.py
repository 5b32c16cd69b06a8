"""ent_coef="auto": the entropy that was asked for, at any scale of the rewards; and kl_coef as a multiple of it."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomObsEnv, make_model

from sb3_staq import StaQ
from sb3_staq.mirror_descent import decay_rate, solve_ent_coef
from sb3_staq.staq import MAX_ENT_COEF_CHANGE

HISTORY = ("entropy", "ent_coef", "kl_coef", "beta")


def train(model, n_steps):
    """Train and return what was logged at each policy update."""
    history = {name: [] for name in HISTORY}
    update = model._update_policy

    def recorded(*args, **kwargs):
        update(*args, **kwargs)
        for name in HISTORY:
            history[name].append(model.logger.name_to_value[f"train/{name}"])

    model._update_policy = recorded
    model.learn(n_steps)
    del model._update_policy
    return {name: np.array(values) for name, values in history.items()}


@pytest.mark.parametrize("sizes", [(3,), (2, 5), (4, 4, 4)])
@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_root(sizes, target, scale):
    """The entropy of each group, summed in double precision."""
    q_values = scale * th.randn(50, sum(sizes), generator=th.Generator().manual_seed(0))
    ent_coef = solve_ent_coef(q_values, sizes, target, lowest=1e-8, highest=1e8)
    entropies = []
    for row in q_values.double().tolist():
        total, start = 0.0, 0
        for size in sizes:
            group = np.array(row[start : start + size]) / ent_coef
            p = np.exp(group - group.max())
            p /= p.sum()
            total -= sum(x * math.log(x) for x in p if x > 0)
            start += size
        entropies.append(total / sum(math.log(size) for size in sizes))
    assert np.mean(entropies) == pytest.approx(target, abs=2e-3)


def test_root_stays_within_its_bounds():
    q_values = th.randn(50, 3)
    assert solve_ent_coef(q_values, (3,), 0.5, 1e-9, 1e-8) == pytest.approx(1e-8, rel=2e-3)
    assert solve_ent_coef(q_values, (3,), 0.5, 1e8, 1e9) == pytest.approx(1e8, rel=2e-3)
    # Nothing to tell apart: no coefficient gives the entropy
    assert solve_ent_coef(th.zeros(50, 3), (3,), 0.5, 0.1, 0.2) == pytest.approx(0.1, rel=2e-3)


@pytest.mark.parametrize("critic", ["additive", "joint"])
@pytest.mark.parametrize("reward_scale", [0.01, 1.0, 100.0])
def test_entropy_is_held_at_any_scale_of_the_rewards(reward_scale, critic):
    env = RandomObsEnv(action_space=spaces.MultiDiscrete([3, 4]))
    model = make_model(
        env,
        ent_coef="auto",
        target_entropy=0.5,
        kl_coef="rel_2.0",
        reward_scale=reward_scale,
        learning_rate=1e-3,
        buffer_size=2000,
        policy_update_interval=20,
        critic=critic,
    )
    history = train(model, 2000)
    assert len(history["entropy"]) == 99
    assert np.abs(history["entropy"][-30:] - 0.5).mean() < 0.1
    ratios = history["ent_coef"][1:] / history["ent_coef"][:-1]
    assert ratios.max() < MAX_ENT_COEF_CHANGE * 1.001
    assert ratios.min() > 1 / MAX_ENT_COEF_CHANGE / 1.001
    np.testing.assert_allclose(history["kl_coef"], 2 * history["ent_coef"])
    np.testing.assert_allclose(history["beta"], decay_rate(2.0, 1.0))


def test_first_value():
    """It is in force until the first policy update, and where the search starts."""
    model = make_model(RandomObsEnv(), ent_coef="auto_3.0")
    assert model._current_ent_coef == 3.0
    history = train(model, 60)
    assert 3.0 / MAX_ENT_COEF_CHANGE <= history["ent_coef"][0] <= 3.0 * MAX_ENT_COEF_CHANGE
    assert (history["kl_coef"] == 1.0).all()  # not relative


def test_target_that_falls():
    """The entropy follows it."""
    model = make_model(
        RandomObsEnv(n_actions=4),
        ent_coef="auto",
        target_entropy="lin_0.8_0.2",
        kl_coef="rel_0.5",
        learning_rate=1e-3,
        buffer_size=2000,
    )
    history = train(model, 2000)
    targets = 0.8 - 0.6 * (20 + 10 * np.arange(1, 199)) / 2000
    assert np.abs(history["entropy"][30:] - targets[30:]).mean() < 0.1


@pytest.mark.parametrize("action_grid", ["factored", "joint"])
def test_default_target_of_a_grid(action_grid):
    """The KL divergence from the uniform policy per dimension, from five values on; the share of a coarser grid."""

    def make(bins, grid=action_grid):
        return make_model("Pendulum-v1", ent_coef="auto", action_grid=grid, action_bins=bins)

    for progress, share in ((1.0, 0.6), (0.5, 0.4), (0.0, 0.2)):
        distance = (1 - share) * math.log(5)
        for bins in (5, 6, 9, 17):
            target = make(bins).target_entropy_schedule(progress)
            assert math.log(bins) - target * math.log(bins) == pytest.approx(distance)
        for model in (make(2), make(3), make(9, "axis")):
            assert model.target_entropy_schedule(progress) == pytest.approx(share)


def test_default_target_of_choices():
    model = make_model(RandomObsEnv(n_actions=9), ent_coef="auto")
    assert [model.target_entropy_schedule(progress) for progress in (1.0, 0.0)] == pytest.approx([0.6, 0.2])


def test_default_target_is_that_of_equally_spread_actions():
    """A bell of one width, laid over grids of 5 and of 9 values."""

    def share(bins, width, centre):
        log_p = -0.5 * ((np.linspace(-1, 1, bins) - centre) / width) ** 2
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        return -(p * np.log(p)).sum() / math.log(bins)

    centres = np.linspace(-1, 1, 41)
    widths = np.linspace(0.1, 1.0, 200)
    width = widths[np.argmin([abs(np.mean([share(5, w, c) for c in centres]) - 0.6) for w in widths])]
    of_nine = make_model("Pendulum-v1", ent_coef="auto", action_bins=9).target_entropy_schedule(1.0)
    assert np.mean([share(9, width, c) for c in centres]) == pytest.approx(of_nine, abs=0.03)


def test_relative_kl_coef_of_a_schedule():
    """It follows a scheduled ent_coef too."""
    model = make_model(RandomObsEnv(), ent_coef="lin_0.4_0.2", kl_coef="rel_3.0")
    history = train(model, 200)
    np.testing.assert_allclose(history["kl_coef"], 3 * history["ent_coef"])
    assert history["ent_coef"][0] > 0.35
    assert history["ent_coef"][-1] < 0.22


def test_a_single_choice_has_no_entropy_to_hold():
    model = make_model(RandomObsEnv(n_actions=1), ent_coef="auto").learn(60)
    assert model._n_policy_updates == 4
    assert math.isfinite(model._current_ent_coef)


def test_save_and_load(tmp_path):
    """The value that was found goes on, whatever the first one was."""
    env = RandomObsEnv()
    model = make_model(env, ent_coef="auto_5.0", kl_coef="rel_1.0").learn(200)
    found = model._current_ent_coef
    assert found != 5.0
    model.save(tmp_path / "x.zip")
    loaded = StaQ.load(tmp_path / "x.zip", env=env)
    assert loaded._current_ent_coef == found
    history = train(loaded, 60)
    assert found / MAX_ENT_COEF_CHANGE <= history["ent_coef"][0] * 1.001
    assert history["ent_coef"][0] <= found * MAX_ENT_COEF_CHANGE * 1.001


@pytest.mark.parametrize(
    ("arguments", "named", "accepted"),
    [
        (dict(ent_coef="auto_0"), "ent_coef='auto_0'", "auto_FIRST"),
        (dict(ent_coef="auto_-1"), "ent_coef='auto_-1'", "auto_FIRST"),
        (dict(ent_coef="auto_inf"), "ent_coef='auto_inf'", "auto_FIRST"),
        (dict(ent_coef="auto0.1"), "ent_coef='auto0.1'", "auto_FIRST"),
        (dict(ent_coef="automatic"), "ent_coef='automatic'", "auto_FIRST"),
        (dict(kl_coef="rel_-1"), "kl_coef='rel_-1'", "rel_FACTOR"),
        (dict(kl_coef="rel"), "kl_coef='rel'", "rel_FACTOR"),
        (dict(kl_coef="rel_nan"), "kl_coef='rel_nan'", "rel_FACTOR"),
        (dict(target_entropy=0.0), "target_entropy=0.0", r"\(0, 1\)"),
        (dict(target_entropy=1.0), "target_entropy=1.0", r"\(0, 1\)"),
        (dict(target_entropy=-3), "target_entropy=-3", "a finite number >= 0"),
        (dict(target_entropy="best"), "target_entropy='best'", "lin_START"),
        (dict(target_entropy="lin_0.5"), "target_entropy='lin_0.5' gives 0.0", r"\(0, 1\)"),
        (dict(ent_coef="auto", logit_rule=[1.0, 0.5], memory_size=2), "ent_coef='auto'", "another logit_rule"),
        (dict(critic="joined"), "critic='joined'", "additive, joint"),
    ],
)
def test_bad_input(arguments, named, accepted):
    with pytest.raises(ValueError, match=named) as error:
        StaQ("MlpPolicy", gym.make("CartPole-v1"), **arguments)
    assert error.match(accepted)


def test_policy_without_entropy_can_be_trained_on():
    """The coefficient that it was made with, 0, is no value to start from."""
    arguments = dict(logit_rule="truncated", ent_coef="auto_0.1", kl_coef="rel_1.0")
    other = make_model(RandomObsEnv(), **{**arguments, "ent_coef": 0.0, "kl_coef": 1.0}).learn(60)
    model = make_model(RandomObsEnv(), **arguments)
    model.set_parameters(other.get_parameters())
    assert model._current_ent_coef == 0
    model.learn(60)
    assert model._current_ent_coef > 0
    assert model.policy.logits(th.rand(5, 4)).isfinite().all()


def test_other_parameters_bring_their_coefficient():
    """Targets and the search for the next value follow the policy that has been loaded."""
    model = make_model(RandomObsEnv(), ent_coef="auto_5.0", kl_coef="rel_1.0").learn(200)
    other = make_model(RandomObsEnv(), ent_coef="auto_5.0", kl_coef="rel_1.0", seed=1)
    assert other._current_ent_coef == 5.0
    other.set_parameters(model.get_parameters())
    assert other._current_ent_coef == model._current_ent_coef != 5.0
