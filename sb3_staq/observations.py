"""Functions that treat observations alike, whether they are tensors or dictionaries of tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_staq.kernels import exporting

# Elements of observations that are evaluated at a time, which bounds the memory for images
OBS_ELEMENTS = 2**21


def map_fields(function: Callable[..., Any], *fields: Any) -> Any:
    """
    Apply a function to fields of the same structure.

    :param function: takes as many tensors or arrays as there are fields
    :param fields: tensors, arrays, or dictionaries or tuples of them; None stays None
    :return: the results in the same structure
    """
    first = fields[0]
    if isinstance(first, dict):
        return {key: map_fields(function, *(field[key] for field in fields)) for key in first}
    if isinstance(first, tuple):
        parts = [map_fields(function, *part) for part in zip(*fields, strict=True)]
        return type(first)._make(parts) if hasattr(first, "_make") else tuple(parts)  # type: ignore[attr-defined]
    return None if first is None else function(*fields)


def select(fields: Any, rows: Any) -> Any:
    """Select rows of all fields, by whatever tensors or arrays can be indexed with."""
    return map_fields(lambda x: x[rows], fields)


def join(parts: Sequence[Any]) -> Any:
    """Concatenate observations: tensors, or dictionaries of them."""
    return map_fields(lambda *tensors: th.cat(tensors), *parts)


def in_parts(function: Callable[[Any], th.Tensor], obs: PyTorchObs) -> th.Tensor:
    """
    Evaluate a function of observations with bounded memory.

    :param function: from observations to a tensor with one row for each
    :param obs: a tensor or a dictionary of tensors
    :return: its value
    """
    tensors = list(obs.values()) if isinstance(obs, dict) else [obs]
    n_at_once = max(1, OBS_ELEMENTS // max(1, sum(x.shape[1:].numel() for x in tensors)))
    if exporting() or len(tensors[0]) <= n_at_once:
        return function(obs)
    starts = range(0, len(tensors[0]), n_at_once)
    return th.cat([function(select(obs, slice(start, start + n_at_once))) for start in starts])


def not_finite(values: Any) -> Iterator[tuple[str, np.ndarray, list[int]]]:
    """
    Find the arrays with numbers that are not finite in single precision.

    :param values: numbers of any type, or a dictionary of them
    :return: for each such array its key, or "", the array itself, and the index of its first such number
    """
    for key, array in values.items() if isinstance(values, dict) else [("", values)]:
        array = np.asarray(array)
        if np.issubdtype(array.dtype, np.floating):  # integers always are finite
            with np.errstate(over="ignore"):
                finite = np.isfinite(array.astype(np.float32, copy=False))
            if not finite.all():
                yield key, array, np.argwhere(~finite)[0].tolist()


def place(key: str, index: Iterable[int]) -> str:
    """Write the position of a number as a Python index, for instance ``['image'][0][3]``; the key may be empty."""
    return "".join(f"[{part!r}]" for part in (*([key] if key else []), *index))
