"""Schedules of coefficients, from what users write: numbers, callables, and the strings of hyperparameter files."""

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule


def make_schedule(name: str, value: float | str | Schedule) -> FloatSchedule:
    """
    :param name: name of the argument, for error messages
    :param value: a number; a callable of the remaining progress (from 1 to 0); or a string as in rl_zoo3's files:
        ``"lin_START"`` falls linearly to 0, ``"lin_START_END"`` to END, ``"lin_START_END_FRACTION"`` reaches END
        after that fraction of the training
    :return: the schedule
    :raise ValueError: if the value is none of these or is negative at the start or the end
    """
    accepted = 'a number >= 0, a callable of the remaining progress, or a string "lin_START[_END[_FRACTION]]"'
    if isinstance(value, str):
        kind, *numbers = value.split("_")
        try:
            start, end, fraction = [*map(float, numbers), *(0.0, 1.0)[len(numbers) - 1 :]]
        except ValueError:
            kind = ""
        if kind != "lin" or not 0 < fraction <= 1:
            raise ValueError(f"{name}={value!r} is not a schedule; accepted: {accepted}")
        schedule = FloatSchedule(LinearSchedule(start, end, fraction))
    elif callable(value) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        schedule = FloatSchedule(value)
    else:
        raise ValueError(f"{name}={value!r} is not a schedule; accepted: {accepted}")
    if not (schedule(1.0) >= 0 and schedule(0.0) >= 0):
        raise ValueError(f"{name}={value!r} is below 0 or not a number; accepted: {accepted}")
    return schedule
