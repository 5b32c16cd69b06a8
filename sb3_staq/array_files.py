"""Replay buffers and the statistics of ``VecNormalize`` as ``.npz`` files, which run no code when loaded."""

import json
import os
import pathlib
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_staq.plain_data import from_json, to_json
from sb3_staq.save_util import PathOrFile, atomic_write, file_name, open_archive

NORMALIZE_ARGUMENTS = (
    *("training", "norm_obs", "norm_reward", "clip_obs", "clip_reward"),
    *("gamma", "epsilon", "norm_obs_keys"),
)


def _save(path: PathOrFile, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Save arrays of numbers together with some plain values. ``np.load`` can read the file, too."""
    with atomic_write(path, "npz") as file:
        np.savez(file, header=np.array(json.dumps(to_json(dict(header)))), **arrays)  # type: ignore[arg-type]


def _load(path: PathOrFile, mmap: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Load the values, as plain JSON, and the arrays; mapped arrays stay in the file, and changes to them in memory."""
    with open_archive(path, "npz") as file:
        try:
            with np.load(file, allow_pickle=False) as npz:
                header = json.loads(str(npz["header"]))
                read = _map if mmap else lambda npz, name: npz[name]
                return header, {name: np.asarray(read(npz, name)) for name in npz.files if name != "header"}
        except MemoryError:
            raise
        except Exception as error:  # of many kinds, since the file may contain anything
            raise ValueError(f"{file_name(path)} is damaged, or not of sb3_staq: {error!r}") from error


def _map(npz: Any, name: str) -> np.ndarray:
    """Map an array into memory, leaving it in the file."""
    file, info = npz.zip.fp, npz.zip.getinfo(f"{name}.npy")
    file.seek(info.header_offset + 26)  # the last 4 of a member's 30 bytes: lengths of its name and extra field
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
    version = np.lib.format.read_magic(file)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if info.compress_type != zipfile.ZIP_STORED or version != (1, 0) or dtype.hasobject:
        raise ValueError(f"{name} cannot be mapped")
    return np.memmap(file, dtype, "c", file.tell(), shape, "F" if is_fortran else "C")


def is_npz(path: Any) -> bool:
    """Return whether something is a path that ends in ".npz"; it may be an open file, or anything else."""
    return isinstance(path, (str, pathlib.Path)) and pathlib.Path(path).suffix == ".npz"


def save_buffer(path: PathOrFile, buffer: ReplayBuffer) -> None:
    """
    Save all arrays of a replay buffer.

    :raise ValueError: if it holds more than numbers, as HER's does with ``copy_info_dict``
    """
    arrays = dict(buffer_arrays(buffer))
    for name, array in arrays.items():
        if array.dtype == object and any(array.flat):
            raise ValueError(f"Invalid replay buffer: its {name} are objects; expected numbers for {file_name(path)}")
    numbers = {name: array for name, array in arrays.items() if array.dtype != object}
    _save(path, {"pos": buffer.pos, "full": buffer.full, **_kind(buffer)}, numbers)


def load_buffer(path: PathOrFile, own: ReplayBuffer, mmap: bool = False) -> ReplayBuffer:
    """
    Load a replay buffer.

    :param own: a buffer of the same kind, which is not changed
    :param mmap: whether the arrays stay in the file until they are used
    :return: a copy of ``own`` with the saved contents
    :raise ValueError: if the file is damaged, or its buffer is of another kind
    """
    header, arrays = _load(path, mmap)
    for name, value in _kind(own).items():
        if header.get(name) != to_json(value):
            raise ValueError(f"Invalid replay buffer: its {name} is {header.get(name)}; expected {value}")
    for name, array in buffer_arrays(own):
        found = arrays.get(name, np.array(None))
        if array.dtype != object and (found.shape, found.dtype) != (array.shape, array.dtype):
            raise ValueError(
                f"Invalid replay buffer: its {name} have shape {found.shape} and type {found.dtype}; expected "
                f"{array.shape} and {array.dtype}, from the model's buffer_size and environments"
            )
    buffer = type(own).__new__(type(own))
    vars(buffer).update(vars(own))
    for name, array in arrays.items():
        owner, _, key = name.partition("/")
        vars(buffer)[owner] = {**vars(buffer).get(owner, {}), key: array} if key else array
    buffer.pos, buffer.full = int(header["pos"]) % buffer.buffer_size, bool(header["full"])
    return buffer


def _kind(buffer: ReplayBuffer) -> dict[str, Any]:
    names = ("observation_space", "action_space", "optimize_memory_usage")
    return {name: getattr(buffer, name) for name in names}


def buffer_arrays(buffer: ReplayBuffer) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and arrays of a replay buffer; those in its dictionaries are named "dictionary/key"."""
    for name, value in vars(buffer).items():
        for key, array in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(array, np.ndarray):
                yield f"{name}/{key}" if isinstance(value, dict) else name, array


def save_vec_normalize(path: PathOrFile, vec_normalize: VecNormalize) -> None:
    """
    Save the arguments and statistics of a ``VecNormalize``, like its own ``save`` but without a pickle.

    :param path: the file; ".npz" is added if it has no suffix
    :param vec_normalize: the wrapper
    """
    arrays = {f"{name}/{key}": value for name, rms in _statistics(vec_normalize) for key, value in vars(rms).items()}
    _save(path, {name: getattr(vec_normalize, name) for name in NORMALIZE_ARGUMENTS}, arrays)


def load_vec_normalize(path: PathOrFile, venv: VecEnv) -> VecNormalize:
    """
    Wrap environments as the saved ``VecNormalize`` did, without running any code from its file.

    :param path: the file
    :param venv: the environments, not yet normalised
    :return: the wrapper
    :raise ValueError: if the file is damaged, or was saved for other observations
    """
    header, arrays = _load(path)
    try:
        arguments = {name: from_json(header[name]) for name in NORMALIZE_ARGUMENTS}
        # Perhaps norm_obs was only switched off for an evaluation
        has_obs = any(name.startswith("obs_rms") for name in arrays)
        vec_normalize = VecNormalize(venv, **{**arguments, "norm_obs": has_obs})
        vec_normalize.norm_obs = arguments["norm_obs"]
        for name, rms in _statistics(vec_normalize):
            for key, own in vars(rms).items():
                array = arrays[f"{name}/{key}"]
                if array.shape != np.shape(own):
                    raise ValueError(f"{name} are of shape {array.shape}")
                vars(rms)[key] = array.astype(float)[()]
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{file_name(path)} has no statistics for these environments: {error!r}") from error
    return vec_normalize


def _statistics(vec_normalize: VecNormalize) -> Iterator[tuple[str, RunningMeanStd]]:
    yield "ret_rms", vec_normalize.ret_rms
    obs_rms: Any = vars(vec_normalize).get("obs_rms", {})  # there are none without norm_obs
    for key, rms in obs_rms.items() if isinstance(obs_rms, dict) else [("", obs_rms)]:
        yield f"obs_rms/{key}", rms
