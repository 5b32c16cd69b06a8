"""Functions that treat observations alike, whether they are tensors or dictionaries of tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_staq.kernels import exporting

# Elements of preprocessed observations that are evaluated at a time, which bounds the memory for images
OBS_ELEMENTS = 2**21


def map_fields(function: Callable[..., Any], *obs: Any) -> Any:
    """Apply a function to observations of the same structure, key by key if they are dictionaries."""
    if not isinstance(obs[0], dict):
        return function(*obs)
    return {key: function(*(x[key] for x in obs)) for key in obs[0]}


def select(obs: Any, rows: Any) -> Any:
    """Select rows of observations: by an index, a slice, a list or a mask."""
    return {key: x[rows] for key, x in obs.items()} if isinstance(obs, dict) else obs[rows]


def join(parts: Sequence[Any]) -> Any:
    """Concatenate observations: tensors, or dictionaries of them."""
    return map_fields(lambda *tensors: th.cat(tensors), *parts)


def in_parts(function: Callable[[Any], th.Tensor], obs: PyTorchObs, n_elements: int) -> th.Tensor:
    """
    Evaluate a function, from observations to a tensor with one row for each, with bounded memory.

    :param n_elements: number of elements of one observation after its preprocessing
    """
    if exporting():
        return function(obs)
    n_obs = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
    n_at_once = max(1, OBS_ELEMENTS // max(1, n_elements))
    if n_obs <= n_at_once:
        return function(obs)
    starts = range(0, n_obs, n_at_once)
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
