"""Schedules of coefficients, from what users write: numbers, callables, and the strings of hyperparameter files."""

from typing import Any

import numpy as np
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

ACCEPTED = 'a finite number >= 0, a callable of the remaining progress, or a string "lin_START[_END[_FRACTION]]"'

# Of ent_coef="auto": it is found within few updates from anywhere
DEFAULT_FIRST_ENT_COEF = 0.1


def is_number(value: Any) -> bool:
    """Whether this is a finite real number (of Python or NumPy; booleans are none)."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _parse(text: str) -> Schedule | None:
    """The linear schedule that a string describes, None if it describes none."""
    kind, *parts = text.split("_")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        return None
    if kind != "lin" or not 1 <= len(numbers) <= 3:
        return None
    start, end, fraction = numbers + [0.0, 1.0][len(numbers) - 1 :]
    return LinearSchedule(start, end, fraction) if 0 < fraction <= 1 else None


def make_schedule(name: str, value: float | str | Schedule) -> FloatSchedule:
    """
    :param name: name of the argument, for error messages
    :param value: a number; a callable of the remaining progress (from 1 to 0); or a string as in rl_zoo3's files:
        ``"lin_START"`` falls linearly to 0, ``"lin_START_END"`` to END, ``"lin_START_END_FRACTION"`` reaches END
        after that fraction of the training
    :return: the schedule
    :raise ValueError: if the value is none of these, or is negative or not finite at the start or the end
    """
    schedule: Schedule | None = None
    if isinstance(value, str):
        schedule = _parse(value)
    elif is_number(value):
        schedule = ConstantSchedule(float(value))  # type: ignore[arg-type]
    elif callable(value):
        schedule = value
    if schedule is None:
        raise ValueError(f"{name}={value!r} is not accepted; accepted: {ACCEPTED}")
    for progress in (1.0, 0.0):
        try:
            number = schedule(progress)
        except Exception as error:
            raise ValueError(
                f"{name}={value!r} failed at progress {progress}: {error!r}; accepted: {ACCEPTED}"
            ) from error
        if not (is_number(number) and number >= 0):
            raise ValueError(f"{name}={value!r} gives {number!r} at progress {progress}; accepted: {ACCEPTED}")
    return FloatSchedule(schedule)


def parse_auto(value: Any) -> float | None:
    """
    :param value: an ``ent_coef``
    :return: the first value of an automatic coefficient, "auto" or "auto_FIRST"; None if it is none
    """
    if not (isinstance(value, str) and value.startswith("auto")):
        return None
    try:
        first = DEFAULT_FIRST_ENT_COEF if value == "auto" else float(value.removeprefix("auto_"))
    except ValueError:
        first = 0.0
    if not (is_number(first) and first > 0):
        accepted = "'auto' or 'auto_FIRST' with a number FIRST > 0"
        raise ValueError(f"ent_coef={value!r} is not accepted; accepted: {accepted}")
    return first


def parse_relative(value: Any) -> float | None:
    """
    :param value: a ``kl_coef``
    :return: the factor of a coefficient that is a multiple of ``ent_coef``, "rel_FACTOR"; None if it is none
    """
    if not (isinstance(value, str) and value.startswith("rel")):
        return None
    try:
        factor = float(value.removeprefix("rel_"))
    except ValueError:
        factor = -1.0
    if not (is_number(factor) and factor >= 0):
        raise ValueError(f"kl_coef={value!r} is not accepted; accepted: 'rel_FACTOR' with a number FACTOR >= 0")
    return factor
