"""The coefficients: the entropy that was asked for, at any scale of the rewards; kl_coef as a multiple of ent_coef."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomObsEnv, make_model, relative_error, slow_q_values
from stable_baselines3.common.callbacks import BaseCallback

from sb3_staq import StaQ
from sb3_staq.coefficients import MAX_ENT_COEF_CHANGE, MIN_ENT_COEF, Coefficients, default_target_entropy, value_at
from sb3_staq.mirror_descent import StackWeights, decay_rate, solve_ent_coef

HISTORY = ("entropy", "ent_coef", "kl_coef", "beta")


def train(model, n_steps):
    """Train and return what was logged at each policy update."""
    history = {name: [] for name in HISTORY}
    update = model.update_policy

    def recorded():
        update()
        for name in HISTORY:
            history[name].append(model.logger.name_to_value[f"train/{name}"])

    model.update_policy = recorded
    model.learn(n_steps)
    del model.update_policy
    return {name: np.array(values) for name, values in history.items()}


@pytest.mark.parametrize("sizes", [(3,), (2, 5), (4, 4, 4)])
@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_root(sizes, target, scale):
    """The entropy of each branch, summed in double precision."""
    q_values = scale * th.randn(50, sum(sizes), generator=th.Generator().manual_seed(0))
    ent_coef = solve_ent_coef(q_values, sizes, target, lowest=1e-8, highest=1e8)
    entropies = []
    for row in q_values.double().tolist():
        total, start = 0.0, 0
        for size in sizes:
            branch = np.array(row[start : start + size]) / ent_coef
            p = np.exp(branch - branch.max())
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


@pytest.mark.parametrize(
    ("critic", "reward_scale"),
    [
        ("additive", 0.01),
        ("additive", 100.0),
        ("joint", 1.0),
        pytest.param("additive", 1.0, marks=pytest.mark.slow),
        pytest.param("joint", 0.01, marks=pytest.mark.slow),
        pytest.param("joint", 100.0, marks=pytest.mark.slow),
    ],
)
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
        train_freq=2,
        gradient_steps=1,
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


@pytest.mark.parametrize("critic", ["additive", "joint"])
def test_automatic_coefficient_is_for_the_critics_that_are_pushed(critic, monkeypatch):
    """For state-action critics, not the online main effects but their average; at the states of the weighted sums."""
    env = RandomObsEnv(action_space=spaces.MultiDiscrete([2, 3]))
    model, given = make_model(env, critic=critic, ent_coef="auto", tau=0.1).learn(60), []
    next_coefficients = Coefficients.next
    monkeypatch.setattr(Coefficients, "next", lambda *args: given.append(args[3:5]) or next_coefficients(*args))
    states, sums = model.replay.sample_states(1024)
    monkeypatch.setattr(model.replay, "sample_states", lambda n: (states, sums))
    model.update_policy()
    ((old_sums, q_new),) = given
    assert old_sums is sums
    assert relative_error(q_new, slow_q_values(model.policy.frozen_critics.newest, states)) < 1e-5


@pytest.mark.parametrize(("target_entropy", "start", "end"), [("lin_0.8_0.2", 0.8, 0.2), ("auto", 0.6, 0.2)])
def test_target_that_falls(target_entropy, start, end):
    """The entropy follows it."""
    model = make_model(
        RandomObsEnv(n_actions=4),
        ent_coef="auto",
        target_entropy=target_entropy,
        kl_coef="rel_0.5",
        learning_rate=1e-3,
        buffer_size=2000,
        train_freq=2,
        gradient_steps=1,
    )
    history = train(model, 2000)
    targets = start - (start - end) * (20 + 10 * np.arange(1, 199)) / 2000
    assert np.abs(history["entropy"][30:] - targets[30:]).mean() < 0.1


@pytest.mark.parametrize("action_grid", ["factored", "joint"])
def test_default_target_of_a_grid(action_grid):
    """The KL divergence from the uniform policy per dimension, from five values on; the share of a coarser grid."""

    def make(bins, grid=action_grid):
        return default_target_entropy(spaces.Box(-2, 2, (1,)), grid, bins)

    for progress, share in ((1.0, 0.6), (0.5, 0.4), (0.0, 0.2)):
        distance = (1 - share) * math.log(5)
        for bins in (5, 6, 9, 17):
            target = make(bins)(progress)
            assert math.log(bins) - target * math.log(bins) == pytest.approx(distance)
        for schedule in (make(2), make(3), make(9, "axis")):
            assert schedule(progress) == pytest.approx(share)


def test_default_target_of_named_actions():
    schedule = default_target_entropy(spaces.Discrete(9), "factored", 5)
    assert [schedule(progress) for progress in (1.0, 0.0)] == pytest.approx([0.6, 0.2])


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
    of_nine = default_target_entropy(spaces.Box(-2, 2, (1,)), "factored", 9)(1.0)
    assert np.mean([share(9, width, c) for c in centres]) == pytest.approx(of_nine, abs=0.03)


def test_relative_kl_coef_of_a_schedule():
    """It follows a scheduled ent_coef too."""
    model = make_model(RandomObsEnv(), ent_coef="lin_0.4_0.2", kl_coef="rel_3.0")
    history = train(model, 200)
    np.testing.assert_allclose(history["kl_coef"], 3 * history["ent_coef"])
    assert history["ent_coef"][0] > 0.35
    assert history["ent_coef"][-1] < 0.22


def test_a_single_bin_has_no_entropy_to_hold():
    model = make_model(RandomObsEnv(n_actions=1), ent_coef="auto").learn(60)
    assert model.n_policy_updates == 4
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
        (dict(target_entropy=-3), "target_entropy=-3", r"a share of the largest entropy in \(0, 1\)"),
        (dict(target_entropy=None), "target_entropy=None", r"a share of the largest entropy in \(0, 1\)"),
        (dict(target_entropy="best"), "target_entropy='best'", "lin_START"),
        (dict(target_entropy="lin_0.5"), r"target_entropy='lin_0.5': 0\.0 at progress 0\.0", r"\(0, 1\)"),
        (dict(ent_coef="auto", logit_rule=[1.0, 0.5], memory_size=2), "ent_coef='auto'", "another logit_rule"),
        (dict(critic="joined"), "critic='joined'", "expected 'additive' or 'joint'"),
    ],
)
def test_bad_input(arguments, named, accepted):
    with pytest.raises(ValueError, match=f"^Invalid {named}.*expected ") as error:
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


# Changed while training: every policy update reads them anew


class Change(BaseCallback):
    """Sets attributes of the model after so many steps."""

    def __init__(self, step, **values):
        super().__init__()
        self.step, self.values = step, values

    def _on_step(self):
        if self.num_timesteps == self.step:
            for name, value in self.values.items():
                setattr(self.model, name, value)
        return True


@pytest.mark.parametrize(
    ("start", "changed", "expected"),
    [
        (dict(kl_coef=1.0, ent_coef=0.1), dict(ent_coef=0.3), (1.0, 0.3)),
        (dict(kl_coef=1.0, ent_coef=0.1), dict(kl_coef="rel_4"), (0.4, 0.1)),
        (dict(kl_coef="rel_2", ent_coef=0.1), dict(ent_coef=lambda progress: 0.7), (1.4, 0.7)),
        (dict(kl_coef="rel_2", ent_coef="auto"), dict(ent_coef="lin_0.5_0.5", kl_coef=np.float32(2.0)), (2.0, 0.5)),
    ],
)
def test_changes_take_effect_at_the_next_update(start, changed, expected):
    model = make_model(RandomObsEnv(), **start)
    coefs = []

    class Record(BaseCallback):
        def _on_training_start(self):
            self.model.policy_update_hooks.append(lambda info: coefs.append((info.kl_coef, info.ent_coef)))

        def _on_step(self):
            return True

    model.learn(100, callback=[Record(), Change(55, **changed)])
    assert len(coefs) == 8
    assert coefs[3:] == [pytest.approx(expected)] * 5
    assert coefs[2] != pytest.approx(expected)


def test_target_entropy_that_is_changed():
    arguments = dict(ent_coef="auto", target_entropy=0.8, kl_coef="rel_0.5", learning_rate=1e-3, buffer_size=2000)
    model = make_model(RandomObsEnv(n_actions=4), **arguments)
    model.learn(1500, callback=Change(700, target_entropy=0.4))
    assert model.logger.name_to_value["train/entropy"] == pytest.approx(0.4, abs=0.01)


def test_target_entropy_with_a_truncated_sum():
    """Its weights sum to (1 - beta^M) / ent_coef, here to 0.38 / ent_coef."""
    arguments = dict(ent_coef="auto", target_entropy=0.5, kl_coef="rel_10", learning_rate=1e-3, buffer_size=2000)
    model = make_model(RandomObsEnv(n_actions=4), logit_rule="truncated", memory_size=5, **arguments).learn(1500)
    assert model.logger.name_to_value["train/entropy"] == pytest.approx(0.5, abs=0.03)


def test_truncated_sum_with_automatic_memory_after_loading(tmp_path):
    """The memory that is needed has grown with the training; the next update of a loaded model is the same."""
    arguments = dict(ent_coef="auto_2", kl_coef=0.5, gamma=0.2, logit_rule="truncated", memory_size="auto")
    model = make_model(RandomObsEnv(), **arguments)
    n_first = model.policy.memory_size
    model.learn(400).save(tmp_path / "model")
    loaded = StaQ.load(tmp_path / "model")
    loaded.replay_buffer = model.replay_buffer
    assert model.policy.memory_size > 10 * n_first
    coefs = []
    for each in (model, loaded):
        np.random.seed(0)
        each.update_policy()
        coefs.append(each.policy.frozen_critics.weights.ent_coef)
    assert coefs[0] == pytest.approx(coefs[1], rel=1e-6)


def test_automatic_coefficient_that_is_switched_on():
    """It starts from the one in force, and changes by its factor at most."""
    model = make_model(RandomObsEnv(), ent_coef=0.1).learn(60)
    model.ent_coef = "auto_50"
    history = train(model, 60)
    assert 0.1 / MAX_ENT_COEF_CHANGE <= history["ent_coef"][0] * 1.001
    assert history["ent_coef"][0] <= 0.1 * MAX_ENT_COEF_CHANGE * 1.001


@pytest.mark.parametrize(
    "changed", [dict(ent_coef=-1.0), dict(kl_coef="much"), dict(target_entropy=2.0, ent_coef="auto")]
)
def test_invalid_changes_are_found_at_the_next_update(changed):
    model = make_model(RandomObsEnv())
    name = next(iter(changed))
    with pytest.raises(ValueError, match=f"^Invalid {name}=.*expected "):
        model.learn(100, callback=Change(55, **changed))
    assert 55 <= model.num_timesteps <= 60
    assert len(model.policy.frozen_critics) == model.n_policy_updates == 3


# By themselves


def test_floor_of_the_corrected_rule():
    """A schedule that falls to 0 is followed down to 1% of its first value; other rules follow it to the end."""
    for rule, last in (("weight_corrected", 0.005), ("truncated", 0.0), ("exact", 0.0)):
        coefficients = Coefficients(1.0, "lin_0.5", 0.5, rule, memory_size=4, gamma=0.99)
        coefficients.check()
        assert coefficients.at(0.5) == (1.0, 0.25)
        assert coefficients.at(0.0) == (1.0, pytest.approx(last))
    assert Coefficients("rel_2", "lin_0.5", 0.5, "weight_corrected", 4, 0.99).at(0.0) == pytest.approx((0.01, 0.005))


@pytest.mark.parametrize("sizes", [(3,), (2, 4)])
@pytest.mark.parametrize("kl_coef", ["rel_0.5", 1.0])
@pytest.mark.parametrize(
    ("root", "expected"), [(0.9, 0.9), (1.1, 1.1), (0.5, 1 / MAX_ENT_COEF_CHANGE), (2.0, MAX_ENT_COEF_CHANGE)]
)
def test_next_automatic_coefficient(root, expected, kl_coef, sizes):
    """
    It is what gives the entropy to the softmax of the weighted average that the stack will be, over ent_coef: the root.
    But it is no more than a factor away from the last one, 1.
    """
    generator = th.Generator().manual_seed(0)
    weights = StackWeights("weight_corrected", 4)
    q_values = [th.randn(40, sum(sizes), generator=generator, dtype=th.float64) for _ in range(3)]
    for _ in q_values[:-1]:
        weights.push(0.5, 1.0)
    sums = sum(w * q for w, q in zip(weights.values, q_values, strict=False))
    beta = 1 / 3 if kl_coef == "rel_0.5" else 0.5
    by_age = [beta * w for w in weights.values] + [1.0]
    average = (sum(w * q for w, q in zip(by_age, q_values, strict=True)) / sum(by_age)).numpy()

    def share_of_entropy(ent_coef):
        total, start = 0.0, 0
        for size in sizes:
            p = np.exp(average[:, start : start + size] / ent_coef)
            p /= p.sum(axis=1, keepdims=True)
            total -= (p * np.log(p)).sum(axis=1).mean()
            start += size
        return total / sum(map(math.log, sizes))

    grid = np.geomspace(0.1, 10, 5000)
    factor = root / grid[np.argmin([abs(share_of_entropy(x) - 0.5) for x in grid])]
    coefficients = Coefficients(kl_coef, "auto_1.0", 0.5, "weight_corrected", 4, 0.99)
    kl, found = coefficients.next(0.7, weights, factor * sums, factor * q_values[-1], sizes)
    assert kl == pytest.approx(0.5 * found if kl_coef == "rel_0.5" else 1.0)
    assert found == pytest.approx(expected, rel=3e-3)


def test_automatic_coefficient_has_a_floor():
    """Where all values are equal, no coefficient gives the entropy that is wanted: the search does not run away."""
    weights = StackWeights("weight_corrected", 4)
    coefficients = Coefficients("rel_1", "auto_2.0", 0.5, "weight_corrected", 4, 0.99)
    for _ in range(100):
        zeros = th.zeros(10, 3)
        weights.push(*coefficients.next(0.5, weights, zeros, zeros, (3,)))
    assert weights.ent_coef == pytest.approx(2.0 * MIN_ENT_COEF, rel=2e-3)


def test_numbers_of_any_kind():
    """Those of NumPy too; booleans, texts and arrays with a dimension are none."""
    for number in (2, 2.0, np.float32(2), np.int8(2), np.float64(2), np.uint64(2)):
        assert value_at("kl_coef", number, 0.5) == value_at("kl_coef", lambda progress, x=number: x, 0.5) == 2.0
        assert type(value_at("kl_coef", number, 0.5)) is float
    for scalar in (np.array, th.tensor):  # as functions of NumPy and PyTorch return
        assert value_at("kl_coef", lambda progress, scalar=scalar: scalar(2.0), 0.5) == 2.0
    for number in (True, np.bool_(True), "2", np.array([2.0]), 2j, None, 10**400, -(10**400)):
        with pytest.raises(ValueError, match=r"^Invalid kl_coef=.*expected a finite number >= 0"):
            value_at("kl_coef", number, 0.5)
        with pytest.raises(ValueError, match=r"^Invalid kl_coef=<function .* at progress 0.5; expected a finite"):
            value_at("kl_coef", lambda progress, x=number: x, 0.5)
