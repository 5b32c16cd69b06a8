"""Arguments as plain JSON beside SB3's pickles, so that models and policies load without running code from a file."""

import io
import json
import pickle
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import cloudpickle
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import buffers, torch_layers
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule, get_device
from stable_baselines3.her import GoalSelectionStrategy, her_replay_buffer

from sb3_staq.save_util import File, atomic_write, file_name, naming_damage, open_archive

# The member of a model's zip that has its arguments
_ARGUMENTS = "arguments.json"
# Objects that are restored, by the arguments that make their like
_PARTS: dict[type, Callable[[Any], Mapping[str, Any]]] = {
    spaces.Box: lambda x: dict(low=x.low, high=x.high, shape=x.shape, dtype=x.dtype),
    # Gymnasium < 1.2 takes no dtype here
    spaces.Discrete: lambda x: dict(n=x.n, start=x.start, **({} if x.dtype == np.int64 else {"dtype": x.dtype})),
    spaces.MultiDiscrete: lambda x: dict(nvec=x.nvec, start=x.start, dtype=x.dtype),
    spaces.MultiBinary: lambda x: dict(n=x.n),
    spaces.Dict: lambda x: dict(spaces=list(x.spaces.items())),  # pairs keep their order
    spaces.Tuple: lambda x: dict(spaces=list(x.spaces)),
    ConstantSchedule: vars,
    LinearSchedule: vars,
    FloatSchedule: vars,
    TrainFreq: TrainFreq._asdict,
    TrainFrequencyUnit: lambda x: dict(value=x.value),
    GoalSelectionStrategy: lambda x: dict(value=x.value),
    deque: lambda x: dict(iterable=list(x), maxlen=x.maxlen),
}
_MAKERS = {cls.__name__: cls for cls in _PARTS}
# Classes that may be named: extractors, activations, optimizers, replay buffers
_CLASSES = [
    cls
    for module in (torch_layers, th.nn.modules.activation, th.optim, buffers, her_replay_buffer)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, (th.nn.Module, th.optim.Optimizer, ReplayBuffer))
]


# JSON


def to_json(value: Any) -> Any:
    """
    Describe a value in plain JSON: exactly where :func:`from_json` can restore it, else by a name for its error.

    :param value: any object
    :return: what ``json.dumps`` takes
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [to_json(item) for item in value]
    if type(value) is tuple:
        return {":tuple": [to_json(item) for item in value]}
    if type(value) is dict and all(type(key) is str and not key.startswith(":") for key in value):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        flat = np.ravel(value)
        is_constant = flat.size > 0 and flat.tobytes() == flat[:1].tobytes() * flat.size
        return {
            ":array": value.dtype.str,
            "shape": list(value.shape),
            "values": (flat[:1] if is_constant else flat).tolist(),
        }
    if isinstance(value, np.dtype) and value.kind in "biuf":
        return {":dtype": value.str}
    if type(value) in _PARTS:
        return {":make": type(value).__name__, **to_json(dict(_PARTS[type(value)](value)))}
    if isinstance(value, type):
        return {":class": _full_name(value)}
    return {":other": f"a {_full_name(type(value))}"}


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class _NotPlainError(Exception):
    """Names what cannot be restored."""


def from_json(
    items: Mapping[str, Any], given: Mapping[str, Any] | None = None, classes: Iterable[type] = (), file: Any = None
) -> dict[str, Any]:
    """
    Restore a dictionary from what :func:`to_json` made of it. Nothing of it is executed.

    :param items: the dictionary in JSON
    :param given: values by their keys that are taken instead
    :param classes: classes that it may name, beside extractors of SB3, activations and optimizers of PyTorch and replay
        buffers of SB3
    :param file: the file that it is for or from, for errors
    :return: the dictionary
    :raise ValueError: names everything that cannot be restored and has to be given
    """
    known = {_full_name(cls): cls for cls in (*_CLASSES, *classes)}
    restored, missing = dict(given or {}), []
    with naming_damage(file):
        for key, item in items.items():
            if key not in restored:
                try:
                    restored[key] = _restore(item, known)
                except _NotPlainError as error:
                    missing.append(f"{key} ({error})")
    if missing:
        message = f"Invalid {file_name(file)}: expected plain values, got code for {', '.join(missing)}"
        raise ValueError(message if given is None else f"{message}. Pass each of these as an argument")
    return restored


def _restore(item: Any, classes: Mapping[str, type]) -> Any:
    if isinstance(item, list):
        return [_restore(each, classes) for each in item]
    if not isinstance(item, dict):
        return item
    if ":other" in item:
        raise _NotPlainError(item[":other"])
    if ":class" in item:
        if item[":class"] not in classes:
            raise _NotPlainError(f"the class {item[':class']}")
        return classes[item[":class"]]
    if ":tuple" in item:
        return tuple(_restore(item[":tuple"], classes))
    if ":dtype" in item:
        return _number_type(item[":dtype"])
    if ":array" in item:
        values, shape = np.array(item["values"], _number_type(item[":array"])), tuple(item["shape"])
        return (np.full(shape, values[0], values.dtype) if values.size == 1 else values.reshape(shape))[()]
    parts = {key: _restore(each, classes) for key, each in item.items() if key != ":make"}
    return _MAKERS[item[":make"]](**parts) if ":make" in item else parts


def _number_type(name: str) -> np.dtype:
    dtype = np.dtype(name)
    if dtype.kind not in "biuf":
        raise ValueError(f"{name!r} is no type of numbers")
    return dtype


# Models and policies


def add_arguments(archive: io.BytesIO, arguments: Mapping[str, Any]) -> None:
    """
    Add its arguments in plain JSON to a model's zip.

    :param archive: what SB3 has saved
    :param arguments: whatever makes the model, tensors aside
    """
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(_ARGUMENTS, json.dumps({name: to_json(value) for name, value in arguments.items()}))


def without_pickles(
    file: Any, given: Mapping[str, Any], classes: Iterable[type] = ()
) -> tuple[io.BytesIO, dict[str, Any]]:
    """
    Reduce a model's zip to its tensors, its plain arguments and texts about versions.

    :param file: the zip, open for reading
    :param given: arguments that are taken instead of saved ones
    :param classes: classes that it may name, see :func:`from_json`
    :return: what SB3 loads without running anything, and the ``custom_objects`` for it
    :raise ValueError: names everything that has to be given
    """
    reduced = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(reduced, "w") as new:
        if _ARGUMENTS not in old.namelist():
            raise ValueError(f"Invalid weights_only=True: {file_name(file)} has its arguments only as code")
        with naming_damage(file):
            items = dict(json.loads(old.read(_ARGUMENTS)))
        arguments = from_json(items, given, classes, file)
        new.writestr("data", json.dumps(dict.fromkeys(arguments)))
        for name in old.namelist():
            if name.endswith(".pth") or name in ("_stable_baselines3_version", "system_info.txt"):
                new.writestr(name, old.read(name))
    reduced.seek(0)
    return reduced, arguments


def save_policy(path: File, state_dict: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """
    Save a policy: its tensors, and its arguments both in plain JSON and pickled.

    :param path: the file
    :param state_dict: its tensors
    :param arguments: what its constructor takes
    """
    saved = {
        "state_dict": state_dict,
        "arguments": json.dumps({name: to_json(value) for name, value in arguments.items()}),
        "pickled_arguments": th.frombuffer(bytearray(cloudpickle.dumps(dict(arguments))), dtype=th.uint8),
    }
    with atomic_write(path) as file:
        th.save(saved, file)


def load_policy(
    path: File,
    device: th.device | str = "auto",
    weights_only: bool = False,
    given: Mapping[str, Any] | None = None,
    classes: Iterable[type] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Load what :func:`save_policy` has saved.

    :param path: the file
    :param device: where the tensors go
    :param weights_only: whether to run no code of the file, so that its pickled arguments are ignored
    :param given: arguments that are taken instead of saved ones
    :param classes: classes that it may name, see :func:`from_json`
    :return: its tensors and the arguments
    :raise ValueError: "PATH is damaged: ..."; or names everything that has to be given
    """
    given = given or {}
    with open_archive(path) as file:
        try:
            saved = th.load(file, map_location=get_device(device), weights_only=True)
        except pickle.UnpicklingError as error:  # a file of BasePolicy.save, or a hostile one
            if weights_only:
                message = f"Invalid weights_only=True: {file_name(file)} has its arguments only as code"
                raise ValueError(message) from error
            file.seek(0)
            saved = th.load(file, map_location=get_device(device), weights_only=False)
            return saved["state_dict"], {**saved["data"], **given}
        except RuntimeError as error:  # PyTorch looks at more of a zip than its members' checksums
            raise ValueError(f"{file_name(file)} is damaged: {error}") from error
        with naming_damage(file):
            state_dict, items = saved["state_dict"], dict(json.loads(saved["arguments"]))
            pickled = saved["pickled_arguments"].cpu().numpy().tobytes()
        if weights_only:
            return state_dict, from_json(items, given, classes, file)
        return state_dict, {**cloudpickle.loads(pickled), **given}
