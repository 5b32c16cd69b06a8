"""Plain JSON for what SB3 pickles, so that models and policies load without running code from their files.

SB3 saves arguments as JSON, but pickles those that JSON cannot express: spaces, classes, schedules. Next to these
pickles, files of this package describe how to make the same objects from plain values and a short list of classes.
"""

import base64
import importlib
import json
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import GenericAlias
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import buffers, torch_layers
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import data_to_json, is_json_serializable, json_to_data
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule, get_device
from stable_baselines3.her import GoalSelectionStrategy, her_replay_buffer

from sb3_staq.save_util import PathOrFile, atomic_write, file_name, open_archive

# The key of this description in a model's data
PLAIN = "_plain"
# What a model file from others must not decide: what is rebuilt in any case, what would be imported by its name, and
# where files go
LEFT_OUT = ("lr_schedule", "_last_obs", "_last_original_obs", "_last_episode_starts", "env", "tensorboard_log")


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# Classes whose objects are rebuilt, and how to get the arguments for this
_ARGUMENTS: dict[type, Callable[[Any], Mapping[str, Any]]] = {
    spaces.Box: lambda x: dict(low=x.low, high=x.high, dtype=x.dtype.str),
    # Gymnasium < 1.2 takes no dtype here
    spaces.Discrete: lambda x: dict(n=x.n, start=x.start, **({} if x.dtype == np.int64 else {"dtype": x.dtype.str})),
    spaces.MultiDiscrete: lambda x: dict(nvec=x.nvec, start=x.start, dtype=x.dtype.str),
    spaces.MultiBinary: lambda x: dict(n=x.n),
    spaces.Dict: lambda x: dict(spaces=list(x.spaces.items())),  # pairs keep their order
    ConstantSchedule: vars,
    LinearSchedule: vars,
    FloatSchedule: vars,
    TrainFreq: TrainFreq._asdict,
    TrainFrequencyUnit: lambda x: dict(value=x.value),
    GoalSelectionStrategy: lambda x: dict(value=x.value),
    deque: lambda x: dict(iterable=list(x), maxlen=x.maxlen),
}
_MAKERS = {_full_name(cls): arguments for cls, arguments in _ARGUMENTS.items()}
_MAKERS["rl_zoo3.utils.SimpleLinearSchedule"] = vars  # the RL Zoo need not be installed
SAFE_BASES = (th.nn.Module, th.optim.Optimizer, ReplayBuffer)
# Classes that may be named: policies, extractors, activations, optimizers, replay buffers
_CLASSES = {
    *("sb3_staq.policies.StaQPolicy", "sb3_staq.policies.CnnPolicy", "sb3_staq.policies.MultiInputPolicy"),
    *("sb3_staq.minatar.MinAtarPolicy", "sb3_staq.minatar.MinAtarCNN"),
    *(
        _full_name(cls)
        for module in (torch_layers, th.nn.modules.activation, th.optim, buffers, her_replay_buffer)
        for cls in vars(module).values()
        # Python 3.10 takes an alias such as dict[str, int] for a class
        if type(cls) is not GenericAlias and isinstance(cls, type) and issubclass(cls, SAFE_BASES)
    ),
}


def to_json(value: Any) -> Any:
    """Describe a value in plain JSON, so that :func:`from_json` can rebuild it, or else by the name of its class."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    name = _full_name(type(value))
    if name in _MAKERS:
        return {":make": name, **to_json(dict(_MAKERS[name](value)))}
    if type(value) is tuple:
        return {":tuple": [to_json(item) for item in value]}
    if type(value) is list:
        return [to_json(item) for item in value]
    if type(value) is dict and all(type(key) is str and key[:1] != ":" for key in value):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        flat = np.ravel(value)
        is_constant = flat.tobytes() == flat[:1].tobytes() * flat.size  # like the bounds of images
        data = base64.b64encode((flat[:1] if is_constant else flat).tobytes()).decode()
        return {":array": value.dtype.str, "shape": list(value.shape), "data": data}
    if isinstance(value, type):
        return {":class": _full_name(value)}
    return {":code": name}


def from_json(item: Any) -> Any:
    """
    Rebuild a value from what :func:`to_json` returned, without running any code.

    :raise ValueError: if it names classes other than policies of this package, extractors and replay buffers of SB3,
        activations and optimizers of PyTorch; or if only the class of an object was saved
    """
    if isinstance(item, list):
        return [from_json(each) for each in item]
    if not isinstance(item, dict):
        return item
    if ":code" in item:
        raise ValueError(f"an object of {item[':code']}")
    if ":class" in item:
        return _known_class(item[":class"], _CLASSES)
    if ":tuple" in item:
        return tuple(from_json(item[":tuple"]))
    if ":array" in item:
        if "data" in item:
            values = np.frombuffer(base64.b64decode(item["data"]), item[":array"])
        else:  # older files
            values = np.asarray(item["values"], item[":array"])
        return np.resize(values, item["shape"])[()]
    parts = {key: from_json(each) for key, each in item.items() if key != ":make"}
    if item.get(":make") == _full_name(spaces.Box):
        parts["shape"] = np.shape(parts["low"])  # otherwise scalar bounds make a shape of (1,)
    return _known_class(item[":make"], _MAKERS)(**parts) if ":make" in item else parts


def _known_class(name: str, known: Iterable[str]) -> type:
    if name not in known:
        raise ValueError(f"the class {name}")
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(module), name)


def plain_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what SB3 would pickle of the data, in plain JSON to be saved with it under the name ``PLAIN``."""
    return {name: to_json(value) for name, value in data.items() if not is_json_serializable(value)}


def objects_without_pickles(data: Mapping[str, Any], given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """
    Rebuild everything that SB3 has pickled in a file, without using its pickles.

    :param data: the data in JSON, as SB3 saves it
    :param given: objects by name that replace saved ones
    :param name: name of the file, for the error message
    :return: ``custom_objects`` with which SB3 unpickles nothing
    :raise ValueError: if objects have to be given; the message lists all of them
    """
    objects, missing = dict(given), []
    for key, value in data.items():
        if key in given or not (isinstance(value, dict) and ":serialized:" in value):
            continue
        item = data.get(PLAIN, {}).get(key, {":code": value.get(":type:")})
        try:
            objects[key] = from_json(item)
        except Exception as error:  # of many kinds, since the data may be anything
            missing.append(f"{key} ({error})")
    if missing:
        example = f"custom_objects={{{missing[0].split(' ')[0]!r}: ...}}"
        raise ValueError(
            f"Invalid weights_only=True: {name} has code for {', '.join(missing)}; expected plain values. Pass what it "
            f"shall be, for instance {example}; or weights_only=False, if you trust the file"
        )
    return objects


def save_policy(path: PathOrFile, state_dict: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Save a policy: its tensors, and the arguments of its constructor as a model's data."""
    data = data_to_json({**arguments, PLAIN: plain_values(arguments)})
    with atomic_write(path) as file:
        th.save({"state_dict": state_dict, "data": data}, file)


def load_policy(
    path: PathOrFile, device: th.device | str, given: Mapping[str, Any], weights_only: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Load what :func:`save_policy` has saved, or a policy in SB3's format, as version 0.1.0 used it.

    :param given: arguments that replace those in the file
    :return: its tensors and the arguments
    :raise ValueError: if the file is damaged; with ``weights_only`` also if arguments have to be given
    """
    device = get_device(device)
    with open_archive(path) as file:
        try:
            saved = th.load(file, map_location=device, weights_only=weights_only)
        except (RuntimeError, pickle.UnpicklingError) as error:  # from PyTorch's own reader
            if weights_only and isinstance(error, pickle.UnpicklingError):
                raise ValueError(
                    f"Invalid weights_only=True: {file_name(path)} has its arguments as code only; expected a file of "
                    "StaQPolicy.save. If you know whose it is, load it without, and save it again"
                ) from error
            raise ValueError(f"{file_name(path)} is damaged, or no policy: {error}") from error
    if not (isinstance(saved, dict) and saved.keys() >= {"state_dict", "data"}):
        raise ValueError(f"{file_name(path)} is no policy: expected a file of StaQPolicy.save")
    data = saved["data"]
    if isinstance(data, str):
        objects = dict(given)
        if weights_only:
            objects = objects_without_pickles(json.loads(data), given, file_name(path))
        data = json_to_data(data, objects)
        del data[PLAIN]
    return saved["state_dict"], {**data, **given}
