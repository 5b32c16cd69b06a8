"""The accepted values of StaQ's arguments, and what None stands for: the only place that defines them."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.type_aliases import TrainFreq

from sb3_staq.action_spaces import ACTION_GRIDS
from sb3_staq.base_policy import CRITIC_REDUCTIONS
from sb3_staq.coefficients import is_number
from sb3_staq.policies import CRITICS, EVAL_POLICIES, POLICY_ARGUMENTS, StaQPolicy


class Argument(NamedTuple):
    """The check of an argument."""

    valid: Callable[[Any], bool]
    expected: str  # in words


LARGEST_INTEGER = 2**62
LARGEST_SEED = 2**32 - 1  # of NumPy


def _is_integer(value: Any, minimum: int, maximum: int = LARGEST_INTEGER) -> bool:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return is_integer and minimum <= value <= maximum


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


def _integer(minimum: int) -> Argument:
    return Argument(partial(_is_integer, minimum=minimum), f"an integer >= {minimum}")


def _one_of(names: Iterable[str]) -> Argument:
    return Argument(lambda x: isinstance(x, str) and x in names, " or ".join(map(repr, names)))


def _is_train_freq(value: Any) -> bool:
    if isinstance(value, TrainFreq):
        return True
    freq, unit = value if isinstance(value, tuple) and len(value) == 2 else (value, "step")
    return _is_integer(freq, 1) and unit in ("step", "episode")


SHARE = Argument(partial(is_number, low=0, high=1), "a number in [0, 1]")
POSITIVE_SHARE = Argument(partial(is_number, above=0, high=1), "a number in (0, 1]")
# `kl_coef`, `ent_coef` and `target_entropy` are checked as schedules, by `coefficients`
ARGUMENTS = {
    "learning_rate": Argument(
        lambda x: callable(x) or is_number(x, low=0), "a finite number >= 0, or a callable of the remaining progress"
    ),
    "buffer_size": _integer(1),
    "learning_starts": _integer(0),
    "batch_size": _integer(1),
    "tau": POSITIVE_SHARE,
    "gamma": SHARE,
    "train_freq": Argument(_is_train_freq, 'an integer >= 1, or a tuple of one and "step" or "episode"'),
    "gradient_steps": _integer(-1),
    "memory_size": Argument(lambda x: _is_auto(x) or _is_integer(x, 1), "'auto' or an integer >= 1"),
    "policy_update_interval": _integer(1),
    "n_critics": _integer(1),
    "critic_reduction": _one_of(CRITIC_REDUCTIONS),
    "target_update_interval": _integer(1),
    "exploration_fraction": POSITIVE_SHARE,
    "exploration_initial_eps": SHARE,
    "exploration_final_eps": SHARE,
    "action_grid": _one_of(ACTION_GRIDS),
    "action_bins": _integer(2),
    "critic": _one_of(CRITICS),
    "eval_policy": _one_of(EVAL_POLICIES),
    "average_window": POSITIVE_SHARE,
    "average_share": SHARE,
    "average_size": Argument(partial(_is_integer, minimum=2, maximum=10_000), "an integer from 2 to 10000"),
    "reward_scale": Argument(partial(is_number, above=0), "a finite number > 0"),
    "logit_cache": Argument(lambda x: isinstance(x, bool) or _is_auto(x), "'auto', True or False"),
    "n_steps": _integer(1),
    "stats_window_size": _integer(1),
    "seed": Argument(lambda x: x is None or _is_integer(x, 0, LARGEST_SEED), "None or an integer from 0 to 2**32 - 1"),
}
# What None stands for, and for a Box with ``action_grid="factored"``: the settings of the MuJoCo tasks, which adapt to
# the scale of the rewards
DEFAULTS = {
    "learning_rate": (3e-4, 7e-4),
    "batch_size": (256, 128),
    "tau": (0.005, 0.01),
    "kl_coef": (0.5, "rel_0.5"),
    "ent_coef": (0.05, "auto_0.2"),
    "policy_update_interval": (500, 100),
    "critic_reduction": ("mean", "min"),
    "exploration_initial_eps": (0.05, 0.0),
    "exploration_final_eps": (0.05, 0.0),
    "critic": ("additive", "joint"),
}
# Arguments that may change during the training, which `train` checks at each call
CHANGEABLE_ARGUMENTS = (
    "batch_size",
    "tau",
    "gamma",
    "memory_size",
    "policy_update_interval",
    "target_update_interval",
    "exploration_fraction",
    "exploration_initial_eps",
    "exploration_final_eps",
    "average_share",
    "reward_scale",
)
# Arguments of `distill`
DISTILL_ARGUMENTS = {
    "max_kl": Argument(partial(is_number, low=0), "a finite number >= 0"),
    "max_steps": _integer(1),
    "states_per_round": _integer(2),
    "n_eval_episodes": _integer(1),
    "seed": Argument(partial(_is_integer, minimum=0, maximum=LARGEST_SEED), "an integer from 0 to 2**32 - 1"),
}
# Arguments of callbacks
CALLBACK_ARGUMENTS = {name: _integer(1) for name in ("n_states", "save_freq", "keep")}


def defaults_for(action_space: spaces.Space | None, action_grid: str) -> dict[str, Any]:
    """
    Return what None stands for, by name, for the arguments that may be None.

    :param action_space: the action space; None if it is not known yet, as during loading
    """
    is_factored_box = isinstance(action_space, spaces.Box) and action_grid == "factored"
    return {name: defaults[is_factored_box] for name, defaults in DEFAULTS.items()}


def check_argument(name: str, value: Any, arguments: dict[str, Argument] = ARGUMENTS) -> None:
    """Raise a ValueError if a value is not accepted for an argument of the table ``arguments``."""
    try:
        valid = bool(arguments[name].valid(value))
    except (TypeError, ValueError):  # such as an array where a number is expected
        valid = False
    if not valid:
        limit = f", at most {LARGEST_INTEGER}" if isinstance(value, int) and value > LARGEST_INTEGER else ""
        raise ValueError(f"Invalid {name}={value!r}: expected {arguments[name].expected}{limit}")


def check_policy_kwargs(policy_kwargs: Any, critic: str) -> None:
    """Raise a ValueError for the first argument of the policy that is not accepted."""
    if not isinstance(policy_kwargs, dict):
        raise ValueError(f"Invalid policy_kwargs={policy_kwargs!r}: expected a dictionary")
    for name in POLICY_ARGUMENTS:
        if name in policy_kwargs:
            raise ValueError(f"Invalid policy_kwargs={policy_kwargs!r}: expected {name} as an argument of StaQ")
    net_arch = policy_kwargs.get("net_arch")
    parts = [] if net_arch is None else [net_arch]
    if isinstance(net_arch, dict) and critic == "joint" and net_arch.keys() == {"pi", "qf"}:
        parts = list(net_arch.values())
    if not all(isinstance(part, list) and all(_is_integer(size, 1) for size in part) for part in parts):
        raise ValueError(
            f"Invalid policy_kwargs['net_arch']={net_arch!r}: expected a list of integers >= 1, the hidden layers of "
            "each critic; with critic='joint' also dict(pi=[...], qf=[...])"
        )
    layer_norm = policy_kwargs.get("layer_norm")
    if not (layer_norm is None or isinstance(layer_norm, bool)):
        raise ValueError(f"Invalid policy_kwargs['layer_norm']={layer_norm!r}: expected True, False or None")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def check_arguments(model: Any) -> None:
    """Raise a ValueError for the first argument of an algorithm that is not accepted; they are its attributes."""
    for name in ARGUMENTS:
        check_argument(name, getattr(model, f"_{name}" if name == "stats_window_size" else name))
    for name in ("train_freq", "learning_rate", "_stats_window_size", "seed"):  # SB3 takes no NumPy numbers here
        value = getattr(model, name)
        setattr(model, name, tuple(map(_plain, value)) if type(value) is tuple else _plain(value))
    if not (isinstance(model.policy_class, type) and issubclass(model.policy_class, StaQPolicy)):
        raise ValueError(f"Invalid policy={model.policy_class!r}: expected a name, or a subclass of StaQPolicy")
    check_policy_kwargs(model.policy_kwargs, model.critic)


def check_best_can_be_found(model: Any) -> None:
    """Refuse to look for the best average without trying any. Only for new models: others may have one."""
    if model.eval_policy == "best" and model.average_share == 0:
        raise ValueError(
            "Invalid eval_policy='best': with average_share=0 the average collects nothing, so no return tells which "
            "one is best; expected average_share > 0, or another eval_policy"
        )


def check_custom_weights(model: Any) -> None:
    """Refuse arguments that are incompatible with custom weights."""
    if isinstance(model.logit_rule, str):
        return
    if model.logit_cache is True:
        raise ValueError(
            f"Invalid logit_cache=True: custom weights, logit_rule={model.logit_rule!r}, follow no recursion; "
            "expected 'auto' or False"
        )
    if (model.eval_policy != "last" or model.average_share > 0) and abs(sum(model.logit_rule)) < 1e-6:
        raise ValueError(
            f"Invalid eval_policy={model.eval_policy!r} and average_share={model.average_share!r}: custom weights that "
            f"sum to 0, logit_rule={model.logit_rule!r}, have no average; expected 'last' and 0"
        )


def check_changed_arguments(model: Any) -> None:
    """Check the arguments that may change during training, and that those of the policy have not changed."""
    for name in CHANGEABLE_ARGUMENTS:
        check_argument(name, getattr(model, name))
    check_custom_weights(model)
    if not isinstance(model.logit_rule, str) and model.memory_size not in ("auto", len(model.logit_rule)):
        expected = f"{len(model.logit_rule)}, the number of custom weights"
        raise ValueError(f"Invalid memory_size={model.memory_size!r}: expected {expected}")
    buffer_gamma = getattr(model.replay_buffer, "gamma", model.gamma)  # n-step returns
    if model.gamma != buffer_gamma:
        raise ValueError(
            f"Invalid gamma={model.gamma!r}: expected {buffer_gamma!r}, as the replay buffer's n-step returns"
        )
    for name in POLICY_ARGUMENTS:
        if name in ("memory_size", "eval_policy"):  # which may change
            continue
        value, built_with = getattr(model, name), getattr(model.policy, name)
        if value != built_with:
            raise ValueError(f"Invalid {name}={value!r}: expected {built_with!r}, with which the model was built")
