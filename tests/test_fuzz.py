"""Random arguments, valid and invalid: a training that works, or a ValueError that says what is wrong."""

import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomObsEnv
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sb3_staq import StaQ

ACTION_SPACES = [
    spaces.Discrete(3, start=-1),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary(2),
    spaces.Box(-2.0, 1.0, (2,), np.float32),
    spaces.Box(0.0, 1.0, (1, 2), np.float64),
]
NUMBERS = [0, 1, 2.5, np.float32(0.5), np.int64(2), 1e-6, 1e3]
NOT_NUMBERS = [math.nan, math.inf, -1, "many", [1.0], {}, True, np.array([1.0, 2.0]), 10**400, 1j]
BAD_INTEGERS = [-2, 0.5, 3.0, "3", [3], True, math.nan, 10**30, np.array([3, 4])]


def lin_strings():
    number = st.sampled_from(["0.1", "1", "2e-1", "0"])
    return st.lists(number, min_size=1, max_size=2).map(lambda numbers: "_".join(["lin", *numbers]))


def falling(progress):
    return 0.1 + 0.4 * progress


def negative_at_the_end(progress):
    return progress - 0.5


def failing(progress):
    raise RuntimeError("no number today")


def share(*more):
    return st.one_of(st.floats(0.0, 1.0), st.sampled_from(more))


# What is accepted by itself; it may not go with other arguments
VALID = {
    "learning_rate": st.one_of(st.floats(0.0, 1e-2), st.sampled_from([0, np.float32(1e-3), falling])),
    "buffer_size": st.integers(1, 200),
    "learning_starts": st.integers(0, 20),
    "batch_size": st.integers(1, 16),
    "tau": st.floats(0.01, 1.0),
    "gamma": share(0, 1, np.float32(0.5)),
    "train_freq": st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 5), st.sampled_from(["step", "episode"]))),
    "gradient_steps": st.integers(-1, 4),
    "memory_size": st.one_of(st.just("auto"), st.integers(1, 6)),
    "logit_rule": st.sampled_from(["weight_corrected", "truncated", "exact", [1.0, 0.5], np.ones(3), falling]),
    "kl_coef": st.one_of(st.sampled_from([*NUMBERS, "rel_0.5", "rel_10", "rel_0", falling]), lin_strings()),
    "ent_coef": st.one_of(st.sampled_from([*NUMBERS, "auto", "auto_0.3", falling]), lin_strings()),
    "target_entropy": st.sampled_from(["auto", 0.5, 0.01, "lin_0.5_0.1", falling]),
    "policy_update_interval": st.integers(1, 20),
    "n_critics": st.integers(1, 3),
    "critic_reduction": st.sampled_from(["mean", "min"]),
    "target_update_interval": st.integers(1, 5),
    "exploration_fraction": st.floats(0.01, 1.0),
    "exploration_initial_eps": share(0, 1),
    "exploration_final_eps": share(0, 1),
    "action_grid": st.sampled_from(["factored", "axis", "joint"]),
    "action_bins": st.integers(2, 6),
    "critic": st.sampled_from(["additive", "joint"]),
    "eval_policy": st.sampled_from(["average", "last"]),
    "average_window": st.floats(0.01, 1.0),
    "average_size": st.integers(2, 9),
    "reward_scale": st.floats(1e-3, 1e2),
    "logit_cache": st.sampled_from(["auto", True, False]),
    "n_steps": st.integers(1, 3),
    "stats_window_size": st.integers(1, 9),
    "seed": st.one_of(st.none(), st.integers(0, 2**32 - 1), st.just(np.int64(3))),
    "policy_kwargs": st.sampled_from([None, {}, dict(net_arch=[]), dict(net_arch=[5, 4]), dict(layer_norm=True)]),
}
INTEGERS = [
    *("buffer_size", "learning_starts", "batch_size", "train_freq", "gradient_steps", "memory_size"),
    *("policy_update_interval", "n_critics", "target_update_interval", "action_bins", "average_size", "n_steps"),
    *("stats_window_size", "seed"),
]
COEFFICIENTS = ["learning_rate", "kl_coef", "ent_coef", "target_entropy"]
NAMES = ["logit_rule", "critic_reduction", "action_grid", "critic", "eval_policy", "logit_cache"]
INVALID = {
    **{name: st.sampled_from(BAD_INTEGERS) for name in INTEGERS},
    **{name: st.sampled_from([*NOT_NUMBERS, negative_at_the_end, failing, "lin_x", "auto_0"]) for name in COEFFICIENTS},
    **{name: st.sampled_from(["Mean", "", 3, [None], {"a": 1}, math.nan]) for name in NAMES},
    **{
        name: st.sampled_from([*NOT_NUMBERS, 1.5])
        for name in ("tau", "gamma", "exploration_fraction", "exploration_initial_eps", "average_window")
    },
    "reward_scale": st.sampled_from([*NOT_NUMBERS, 0]),
    "policy_kwargs": st.sampled_from(["net_arch", 3, dict(net_arch=[0]), dict(n_critics=2), dict(layer_norm=3)]),
}
INVALID["learning_rate"] = st.sampled_from([*NOT_NUMBERS, failing, "lin_0.1", lambda progress: -1.0])


@st.composite
def configurations(draw):
    """An action space, arguments for StaQ, and the one of them that is invalid, if any is."""
    action_space = draw(st.sampled_from(ACTION_SPACES))
    chosen = draw(st.lists(st.sampled_from(sorted(VALID)), max_size=10, unique=True))
    arguments = {name: draw(VALID[name]) for name in chosen}
    wrong = draw(st.one_of(st.none(), st.sampled_from(sorted(INVALID))))
    if wrong is not None:
        arguments[wrong] = draw(INVALID[wrong])
    return action_space, arguments, wrong


def assert_says_what_is_wrong(error, arguments):
    """It names an argument with its value, and what is expected."""
    message = str(error)
    match = re.match(r"Invalid (\w+)(\[.*?\])?=", message)
    assert match, message
    assert "expected " in message[match.end() :], message
    name = match[1]
    if name in arguments and match[2] is None:
        assert message.startswith(f"Invalid {name}={arguments[name]!r}"), message


def try_out(action_space, arguments, wrong):
    quick = dict(
        buffer_size=100, learning_starts=5, batch_size=8, policy_update_interval=7, policy_kwargs=dict(net_arch=[6])
    )
    arguments = {**quick, **arguments}
    env = RandomObsEnv(action_space=action_space)
    try:
        model = StaQ("MlpPolicy", env, device="cpu", **arguments)
    except ValueError as error:
        assert_says_what_is_wrong(error, arguments)
        if wrong is not None and wrong not in str(error).partition("expected ")[0]:
            # Two others that do not go together were found first: they are still found without the wrong one
            rest = {name: value for name, value in arguments.items() if name != wrong}
            with pytest.raises(ValueError, match=re.escape(str(error).partition(":")[0])):
                StaQ("MlpPolicy", env, device="cpu", **rest)
        return False
    assert wrong is None, (wrong, arguments[wrong])
    model.learn(30)
    assert model.num_timesteps >= 30
    assert all(th.isfinite(value).all() for value in model.policy.state_dict().values())
    obs = np.random.default_rng(0).uniform(-1, 1, (9, 4)).astype(np.float32)
    actions, _ = model.predict(obs, deterministic=True)
    assert all(action_space.contains(action) for action in actions)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        loaded = StaQ.load(Path(folder) / "model", env=env)
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], actions)
    assert th.equal(loaded.policy.logits(th.as_tensor(obs)), model.policy.logits(th.as_tensor(obs)))
    loaded.learn(10, reset_num_timesteps=False)
    return True


def fuzz(n_examples):
    """Try so many configurations, the same in each run; at least a fifth of them each way."""
    outcomes = []

    # Without shrinking, which takes minutes: the arguments are few
    @settings(
        max_examples=n_examples, derandomize=True, deadline=None, phases=[Phase.generate], report_multiple_bugs=False
    )
    @given(configurations())
    def run(configuration):
        outcomes.append(try_out(*configuration))

    run()
    assert len(outcomes) >= n_examples
    assert n_examples / 5 < sum(outcomes) < 4 * n_examples / 5


def test_thirty_configurations():
    fuzz(30)


@pytest.mark.slow
def test_two_hundred_configurations():
    fuzz(200)
