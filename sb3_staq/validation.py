"""Checks of the algorithm's arguments: bad input is refused before any training time is spent."""

from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3.common.type_aliases import TrainFreq

from sb3_staq.action_spaces import ACTION_GRIDS, make_action_groups
from sb3_staq.policies import CRITIC_REDUCTIONS, CRITICS
from sb3_staq.schedules import is_number

if TYPE_CHECKING:
    from sb3_staq.staq import StaQ

# Arguments of the policy that the algorithm sets itself
POLICY_ARGUMENTS = (
    "n_critics",
    "critic_reduction",
    "memory_size",
    "logit_rule",
    "action_grid",
    "action_bins",
    "critic",
)


def _is_whole(value: Any, minimum: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= minimum)


def check_arguments(model: "StaQ") -> None:
    """
    :param model: an algorithm whose arguments are set but not yet used
    :raise ValueError: for the first argument that is out of range; names it, its value and what is accepted
    """

    def check(name: str, valid: bool, accepted: str) -> None:
        if not valid:
            value = getattr(model, f"_{name}" if name == "stats_window_size" else name)
            raise ValueError(f"{name}={value!r} is not accepted; accepted: {accepted}")

    minima = {
        "buffer_size": 1,
        "learning_starts": 0,
        "batch_size": 1,
        "gradient_steps": -1,
        "memory_size": 1,
        "policy_update_interval": 1,
        "n_critics": 1,
        "target_update_interval": 1,
        "n_steps": 1,
        "action_bins": 2,
    }
    for name, minimum in minima.items():
        check(name, _is_whole(getattr(model, name), minimum), f"a whole number >= {minimum}")
    check("stats_window_size", _is_whole(model._stats_window_size, 1), "a whole number >= 1")
    for name in ("gamma", "exploration_initial_eps", "exploration_final_eps"):
        value = getattr(model, name)
        check(name, is_number(value) and 0 <= value <= 1, "a number in [0, 1]")
    for name in ("tau", "exploration_fraction"):
        value = getattr(model, name)
        check(name, is_number(value) and 0 < value <= 1, "a number in (0, 1]")
    check("reward_scale", is_number(model.reward_scale) and model.reward_scale > 0, "a finite number > 0")
    for name, names in {
        "critic_reduction": tuple(CRITIC_REDUCTIONS),
        "action_grid": ACTION_GRIDS,
        "critic": CRITICS,
    }.items():
        check(name, getattr(model, name) in names, ", ".join(names))
    check("logit_cache", isinstance(model.logit_cache, bool) or model.logit_cache == "auto", "'auto', True, False")
    learning_rate = model.learning_rate
    valid = callable(learning_rate) or (is_number(learning_rate) and learning_rate >= 0)
    check("learning_rate", valid, "a finite number >= 0, or a callable of the remaining progress")
    if not isinstance(model.train_freq, TrainFreq):
        train_freq = model.train_freq if isinstance(model.train_freq, tuple) else (model.train_freq, "step")
        valid = len(train_freq) == 2 and _is_whole(train_freq[0], 1) and train_freq[1] in ("step", "episode")
        check("train_freq", valid, 'a whole number >= 1, or a tuple of one and "step" or "episode"')
    _check_policy_kwargs(model.policy_kwargs, model.critic)
    make_action_groups(model.action_space, model.action_grid, model.action_bins)


def _check_policy_kwargs(policy_kwargs: Any, critic: str) -> None:
    if not isinstance(policy_kwargs, dict):
        raise ValueError(f"policy_kwargs={policy_kwargs!r} is not accepted; accepted: a dictionary")
    for name in POLICY_ARGUMENTS:
        if name in policy_kwargs:
            raise ValueError(f"policy_kwargs={policy_kwargs!r} has {name!r}; accepted: {name} as an argument of StaQ")
    net_arch = policy_kwargs.get("net_arch")
    if isinstance(net_arch, dict) and critic == "joint" and net_arch.keys() == {"pi", "qf"}:
        parts = list(net_arch.values())
    else:
        parts = [] if net_arch is None else [net_arch]
    if not all(isinstance(part, list) and all(_is_whole(size, 1) for size in part) for part in parts):
        raise ValueError(
            f"policy_kwargs['net_arch']={net_arch!r} is not accepted; accepted: a list of whole numbers >= 1, the "
            "hidden layers of each critic; for critic='joint' also dict(pi=[...], qf=[...])"
        )
    layer_norm = policy_kwargs.get("layer_norm")
    if not (layer_norm is None or isinstance(layer_norm, bool)):
        raise ValueError(f"policy_kwargs['layer_norm']={layer_norm!r} is not accepted; accepted: True, False, None")


def check_coefficients(model: "StaQ") -> None:
    """
    :param model: an algorithm with its schedules
    :raise ValueError: if a coefficient that the logit rule divides by is 0
    """
    if model.logit_rule == "weight_corrected" and model.ent_coef_schedule(1.0) == 0:
        raise ValueError(
            f"ent_coef={model.ent_coef!r} starts at 0, and logit_rule='weight_corrected' divides by it; accepted: a "
            "number or schedule that starts above 0, or another logit_rule"
        )
    if isinstance(model.logit_rule, tuple) and model._ent_coef_is_auto:
        raise ValueError(
            f"ent_coef={model.ent_coef!r} has no influence on custom weights, logit_rule={model.logit_rule!r}; "
            "accepted: a number or schedule, or another logit_rule"
        )
    for progress in (1.0, 0.0):
        target = model.target_entropy_schedule(progress)
        if not 0 < target < 1:
            raise ValueError(
                f"target_entropy={model.target_entropy!r} gives {target!r} at progress {progress}; accepted: 'auto', a "
                "number in (0, 1), or a schedule within it"
            )
    for progress, when in ((1.0, "start"), (0.0, "end")):
        if model._coefficients_at(progress) == (0.0, 0.0):
            raise ValueError(
                f"kl_coef={model.kl_coef!r} and ent_coef={model.ent_coef!r} are both 0 at the {when} of the training; "
                "accepted: a sum above 0"
            )
