"""The coefficients ``kl_coef`` and ``ent_coef``: schedules, automatic entropy, relative KL, and their checks."""

import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule

from sb3_staq.memory_bounds import auto_memory_size
from sb3_staq.mirror_descent import PolicyUpdate, StackWeights, decay_rate, solve_ent_coef

# The first value for ent_coef="auto": from anywhere, a few updates find the right one
FIRST_ENT_COEF = 0.1
# An automatic ent_coef changes by at most this factor per policy update
MAX_ENT_COEF_CHANGE = 1.3
# ... and never falls below this share of its first value: where all Q-values are equal, none gives the target entropy
MIN_ENT_COEF = 1e-6
# The largest automatic memory_size, as in the paper: where ent_coef falls to 0, what the theorem asks for has no limit
MAX_AUTO_MEMORY = 300
# Mean entropy that an automatic ent_coef keeps, as a share of the largest: at the start and at the end of training
TARGET_ENTROPY = (0.6, 0.2)
# ... for a Box with this many values per dimension
TARGET_ENTROPY_BINS = 5

SCHEDULE = 'a callable of the remaining progress, or a string "lin_START[_END[_FRACTION]]"'
EXPECTED = f"a finite number >= 0, {SCHEDULE}"
EXPECTED_TARGET = f"'auto', a share of the largest entropy in (0, 1), {SCHEDULE}"


def is_number(value: Any, low: float = -math.inf, high: float = math.inf, above: float = -math.inf) -> bool:
    """Return whether this is a finite real number (of Python or NumPy; booleans are not) within the limits."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    try:
        return bool(math.isfinite(value) and low <= value <= high and value > above)
    except OverflowError:  # an integer too large for a float
        return False


def _parse_linear(text: str) -> Schedule | None:
    kind, *parts = text.split("_")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        return None
    if kind != "lin" or not 1 <= len(numbers) <= 3:
        return None
    start, end, fraction = numbers + [0.0, 1.0][len(numbers) - 1 :]
    return LinearSchedule(start, end, fraction) if 0 < fraction <= 1 else None


def value_at(name: str, value: Any, progress: float, expected: str = EXPECTED) -> float:
    """
    Evaluate a number or schedule, in any form that users may write.

    :param name: name of the argument, for error messages
    :param value: a number; a callable of the remaining progress (from 1 to 0); or a string as in rl_zoo3's files:
        ``"lin_START"`` falls linearly to 0, ``"lin_START_END"`` to END, ``"lin_START_END_FRACTION"`` reaches END
        after that fraction of the training
    :param progress: the remaining progress
    :param expected: what is accepted, for error messages
    :return: the number
    :raise ValueError: if the value is none of these, or the number is negative or not finite
    """
    schedule: Any = _parse_linear(value) if isinstance(value, str) else value
    if not (callable(schedule) or is_number(schedule)):
        raise ValueError(f"Invalid {name}={value!r}: expected {expected}")
    try:
        number = schedule(progress) if callable(schedule) else float(schedule)
    except Exception as error:
        raise ValueError(f"Invalid {name}={value!r}: {error!r} at progress {progress}; expected {expected}") from error
    if isinstance(number, (np.ndarray, th.Tensor)) and number.ndim == 0:
        number = number.item()
    if not is_number(number, low=0):
        raise ValueError(f"Invalid {name}={value!r}: {number!r} at progress {progress}; expected {expected}")
    return float(number)


def _number_after(prefix: str, name: str, value: Any, expected: str, **limits: float) -> float | None:
    """
    Parse an argument of the form ``"PREFIX_NUMBER"``.

    :param prefix: the prefix, without the underscore
    :param name: name of the argument, for error messages
    :param value: its value
    :param expected: what is accepted, for error messages
    :param limits: of the number, see :func:`is_number`
    :return: the number; None if the value does not begin with the prefix
    :raise ValueError: if what follows is no such number
    """
    if not (isinstance(value, str) and value.startswith(prefix)):
        return None
    try:
        number = float(value.removeprefix(f"{prefix}_"))
    except ValueError:
        number = math.nan
    if is_number(number, **limits):
        return number
    raise ValueError(f"Invalid {name}={value!r}: expected {expected}")


def default_target_entropy(action_space: spaces.Space, action_grid: str, action_bins: int) -> Schedule:
    """
    Make the schedule for ``target_entropy="auto"``.

    On a finer grid, equally spread actions have a larger share of the largest entropy. What stays the same is their
    distance from the uniform policy, ``(1 - share) * log(bins)`` nats per dimension. A coarser grid does not have that
    much room, so it keeps the share.
    """
    factor = 1.0
    if isinstance(action_space, spaces.Box) and action_grid != "axis":
        factor = min(1.0, math.log(TARGET_ENTROPY_BINS) / math.log(action_bins))
    start, end = (1.0 - factor * (1.0 - share) for share in TARGET_ENTROPY)
    return LinearSchedule(start, end, 1.0)


@dataclass(frozen=True)
class Coefficients:
    """
    The coefficients that the arguments describe at one moment of the training.

    :param kl_coef: a number, a schedule or "rel_FACTOR", a multiple of ``ent_coef``
    :param ent_coef: a number, a schedule or "auto_FIRST"
    :param target_entropy: a number or a schedule, for an automatic ``ent_coef``
    :param logit_rule: rule of the stack; "weight_corrected" divides by ``ent_coef``, which then does not fall to 0
    :param memory_size: an integer, or "auto" for what the coefficients ask for
    :param gamma: discount factor
    """

    kl_coef: Any
    ent_coef: Any
    target_entropy: Any
    logit_rule: Any
    memory_size: int | str
    gamma: float

    @property
    def rule(self) -> str | None:
        """The name of the logit rule, None for custom weights."""
        return self.logit_rule if isinstance(self.logit_rule, str) else None

    @property
    def first_ent_coef(self) -> float | None:
        """The first value of an automatic ``ent_coef``."""
        if isinstance(self.ent_coef, str) and self.ent_coef == "auto":
            return FIRST_ENT_COEF
        expected = "'auto' or 'auto_FIRST' with a number FIRST > 0"
        return _number_after("auto", "ent_coef", self.ent_coef, expected, above=0)

    def at(self, progress: float) -> tuple[float, float]:
        """
        Evaluate the schedules; an automatic ``ent_coef`` has its first value.

        :param progress: the remaining progress, from 1 to 0
        :return: ``(kl_coef, ent_coef)``
        :raise ValueError: if one is invalid, or both are 0
        """
        ent_coef = self.first_ent_coef
        if ent_coef is None:
            ent_coef = value_at("ent_coef", self.ent_coef, progress)
            if self.rule == "weight_corrected":
                ent_coef = max(ent_coef, 0.01 * value_at("ent_coef", self.ent_coef, 1.0))
                if ent_coef == 0:
                    raise ValueError(
                        f"Invalid ent_coef={self.ent_coef!r}: it starts at 0, and logit_rule='weight_corrected' "
                        "divides by it; expected a number or schedule that starts above 0, or another logit_rule"
                    )
        kl_coef = self._kl_coef_at(progress, ent_coef)
        if kl_coef == ent_coef == 0:
            raise ValueError(
                f"Invalid kl_coef={self.kl_coef!r} and ent_coef={self.ent_coef!r}: both are 0 at progress {progress}; "
                "expected a sum above 0"
            )
        return kl_coef, ent_coef

    def _kl_coef_at(self, progress: float, ent_coef: float) -> float:
        factor = _number_after("rel", "kl_coef", self.kl_coef, "'rel_FACTOR' with a number FACTOR >= 0", low=0)
        return value_at("kl_coef", self.kl_coef, progress) if factor is None else factor * ent_coef

    def target_entropy_at(self, progress: float) -> float:
        """
        Evaluate the schedule of the entropy that an automatic ``ent_coef`` keeps.

        :param progress: the remaining progress, from 1 to 0
        :return: a share of the largest entropy, in (0, 1)
        :raise ValueError: if it is not in this range
        """
        target = value_at("target_entropy", self.target_entropy, progress, EXPECTED_TARGET)
        if not 0 < target < 1:
            raise ValueError(
                f"Invalid target_entropy={self.target_entropy!r}: {target!r} at progress {progress}; expected "
                f"{EXPECTED_TARGET}"
            )
        return target

    def memory_size_for(self, kl_coef: float, ent_coef: float) -> int:
        """
        Return the number of critics that the stack keeps under the given coefficients.

        :return: ``memory_size``; if it is "auto", what the theorem asks for, up to ``MAX_AUTO_MEMORY``, or the number
            of custom weights
        :raise ValueError: if it is "auto" and ``ent_coef`` is 0
        """
        if not isinstance(self.memory_size, str):
            return int(self.memory_size)
        if self.rule == "exact":
            return 1  # memory_size has no effect
        if self.rule is None and isinstance(self.logit_rule, Sized):
            return len(self.logit_rule)
        return min(MAX_AUTO_MEMORY, auto_memory_size(self.gamma, kl_coef, ent_coef))

    def check(self) -> int:
        """
        Check all schedules, by evaluating them at the start and the end of the training.

        :return: the number of critics that the stack keeps at the start
        :raise ValueError: for the first value that is invalid
        """
        if self.first_ent_coef is not None and self.rule is None:
            raise ValueError(
                f"Invalid ent_coef={self.ent_coef!r}: it has no influence on custom weights, "
                f"logit_rule={self.logit_rule!r}; expected a number or schedule, or another logit_rule"
            )
        # Otherwise, "auto" would fail only in the last policy update, if ent_coef falls to 0
        memory_sizes = []
        for progress in (1.0, 0.0):
            self.target_entropy_at(progress)
            memory_sizes.append(self.memory_size_for(*self.at(progress)))
        return memory_sizes[0]

    def next(
        self, progress: float, weights: StackWeights, logit_sums: th.Tensor, q_new: th.Tensor, branch_sizes: Any
    ) -> tuple[float, float]:
        """
        Compute the coefficients of the policy update that is due.

        :param progress: the remaining progress, from 1 to 0
        :param weights: weights of the stack before the update
        :param logit_sums: the weighted sums before the update at replayed states, shape (batch, n_bins)
        :param q_new: Q-values of the critics to be pushed, at the same states, same shape
        :return: ``(kl_coef, ent_coef)``
        :raise ValueError: if a schedule gives an invalid number
        """
        if self.first_ent_coef is None:
            return self.at(progress)
        # The logits tend to the stack's weighted average / ent_coef: find the ent_coef that gives them the entropy
        least = MIN_ENT_COEF * self.first_ent_coef
        ent_coef = max(self.first_ent_coef if weights.ent_coef is None else weights.ent_coef, least)
        kl_coef = self._kl_coef_at(progress, ent_coef)
        beta = decay_rate(kl_coef, ent_coef)
        average = PolicyUpdate(beta).apply(logit_sums, q_new) / (beta * weights.total + 1.0)
        if self.rule == "truncated":  # whose weights sum to less than 1 / ent_coef
            average = average * (1.0 - beta ** self.memory_size_for(kl_coef, ent_coef))
        ent_coef = solve_ent_coef(
            average,
            branch_sizes,
            self.target_entropy_at(progress),
            lowest=max(ent_coef / MAX_ENT_COEF_CHANGE, least),
            highest=ent_coef * MAX_ENT_COEF_CHANGE,
        )
        return self._kl_coef_at(progress, ent_coef), ent_coef
