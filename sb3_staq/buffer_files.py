"""Replay buffers and the statistics of VecNormalize as files: arrays that load without running code, or pickles."""

import json
import pathlib
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_staq.plain_json import from_json, to_json
from sb3_staq.save_util import File, atomic_write, file_name, load_pickles, naming_damage, open_archive, save_pickles

# The member of an archive of arrays that has everything else
_HEADER = "header.json"
# Arrays in files start at multiples of it, so that they can be used where they are
_ALIGNMENT = 64
# What the replay buffers' constructors take, beside the environment and the device
_BUFFER_ARGUMENTS = (
    *("buffer_size", "observation_space", "action_space", "n_envs"),
    *("optimize_memory_usage", "handle_timeout_termination"),
)
_BUFFERS: dict[type[ReplayBuffer], tuple[str, ...]] = {
    ReplayBuffer: (),
    DictReplayBuffer: (),
    NStepReplayBuffer: ("n_steps", "gamma"),
    HerReplayBuffer: ("n_sampled_goal", "goal_selection_strategy", "copy_info_dict"),
}
_NORMALIZATION_ARGUMENTS = (
    *("training", "norm_obs", "norm_reward", "clip_obs", "clip_reward"),
    *("gamma", "epsilon", "norm_obs_keys"),
)
_STATISTICS = ("mean", "var", "count")


# Arrays


def save_arrays(path: File, kind: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """
    Save arrays and some plain values, as a file that ``np.load`` reads.

    :param path: the file, "npz" if it has no suffix
    :param kind: what it is
    :param header: the values, see :func:`to_json`
    :param arrays: the arrays
    :raise ValueError: if a value is not plain
    """
    items = to_json(dict(header))
    from_json(items, file=path)  # refuses what could not be loaded
    with atomic_write(path, "npz") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr(_HEADER, json.dumps({"kind": kind, **items}))
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")
            # The local header has 30 bytes, the name, 20 bytes for sizes of more than 32 bits, and the padding
            start = archive.fp.tell() + 30 + len(info.filename.encode()) + 20 + 4  # type: ignore[union-attr]
            padding = -start % _ALIGNMENT
            info.extra = struct.pack("<HH", 0xFFFF, padding) + bytes(padding)
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)  # type: ignore[arg-type]


def load_arrays(path: File, kind: str, mmap: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """
    Load what :func:`save_arrays` has saved.

    :param path: the file
    :param kind: what it has to be
    :param mmap: leave the arrays in the file until they are used; changes of them stay in memory
    :return: the values and the arrays
    :raise ValueError: "PATH is damaged: ..."; or if it is of another kind
    """
    with open_archive(path, "npz") as file, zipfile.ZipFile(file) as archive:
        with naming_damage(file):
            items = dict(json.loads(archive.read(_HEADER))) if _HEADER in archive.namelist() else {}
        if (found := items.pop("kind", "something else")) != kind:
            raise ValueError(f"Invalid path={file_name(file)!r}: expected a {kind}, got {found!r}")
        header = from_json(items, file=file)
        read = _map_array if mmap else _read_array
        with naming_damage(file):
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            return header, {info.filename.removesuffix(".npy"): read(file, archive, info) for info in members}


def _read_array(file: Any, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _map_array(file: Any, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    file.seek(info.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    file.seek(info.header_offset + 30 + name_length + extra_length)
    if info.compress_type != zipfile.ZIP_STORED or np.lib.format.read_magic(file) != (1, 0):
        return _read_array(file, archive, info)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or 0 in shape:  # pointers are refused, and nothing cannot be mapped
        return _read_array(file, archive, info)
    return np.asarray(np.memmap(file, dtype, "c", file.tell(), shape, "F" if is_fortran else "C"))


# Replay buffers and statistics


def save_buffer(path: File, buffer: ReplayBuffer, extra: Mapping[str, np.ndarray] | None = None) -> None:
    """
    Save a replay buffer: as arrays to a path that ends in ".npz", else as a pickle, which SB3 loads too.

    :param path: the file, "pkl" if it has no suffix
    :param buffer: the replay buffer
    :param extra: arrays to save with it
    :raise ValueError: if arrays are not all that it has
    """
    if not _is_npz(path):
        save_pickles(path, buffer, dict(extra or {}))
        return
    if type(buffer) not in _BUFFERS:
        names = ", ".join(cls.__name__ for cls in _BUFFERS)
        raise ValueError(f"Invalid replay buffer: expected {names} for {path}, got {type(buffer).__name__}")
    if getattr(buffer, "copy_info_dict", False):
        raise ValueError(f"Invalid copy_info_dict=True: expected False for {path}, as infos may be of any class")
    arguments = {name: getattr(buffer, name) for name in (*_BUFFER_ARGUMENTS, *_BUFFERS[type(buffer)])}
    arguments["buffer_size"] *= buffer.n_envs  # SB3 has divided it
    header = {"class": type(buffer), "pos": buffer.pos, "full": buffer.full, **arguments}
    arrays = {name: array for name, (_, _, array) in _find_arrays(buffer).items()}
    extra_arrays = {f"extra/{name}": array for name, array in (extra or {}).items()}
    save_arrays(path, "replay buffer", header, {**arrays, **extra_arrays})


def load_buffer(path: File, mmap: bool = False) -> tuple[ReplayBuffer, dict[str, np.ndarray]]:
    """
    Load a replay buffer. Of a file that ends in ".npz" no code is run.

    :param path: the file
    :param mmap: leave the arrays of an ".npz" in the file until they are used
    :return: the buffer, of whose environment and device nothing is known; and the arrays saved with it
    :raise ValueError: "PATH is damaged: ..."; or if it has no replay buffer
    """
    if not _is_npz(path):
        buffer, *rest = load_pickles(path)
        if not isinstance(buffer, ReplayBuffer):
            raise ValueError(f"Invalid replay buffer: expected a ReplayBuffer in {path}, got {type(buffer).__name__}")
        return buffer, rest[0] if rest else {}
    header, arrays = load_arrays(path, "replay buffer", mmap=mmap)
    with naming_damage(path):
        arguments = {name: header[name] for name in (*_BUFFER_ARGUMENTS, *_BUFFERS[header["class"]])}
        env = {"env": None} if header["class"] is HerReplayBuffer else {}
        buffer = header["class"](**arguments, **env, device="cpu")
        buffer.pos, buffer.full = int(header["pos"]), bool(header["full"])
        for name, (container, key, own) in _find_arrays(buffer).items():
            if arrays[name].shape != own.shape:
                raise ValueError(f"{name} has shape {arrays[name].shape} instead of {own.shape}")
            container[key] = arrays[name]
    return buffer, {name.removeprefix("extra/"): arrays[name] for name in arrays if name.startswith("extra/")}


def _is_npz(path: File) -> bool:
    return isinstance(path, (str, pathlib.Path)) and pathlib.Path(path).suffix == ".npz"


def _find_arrays(buffer: ReplayBuffer) -> dict[str, tuple[dict[str, Any], str, np.ndarray]]:
    """The arrays of numbers in a replay buffer by name, with the dictionary and the key where they are."""
    found = {name: (vars(buffer), name, value) for name, value in vars(buffer).items()}
    for name, value in vars(buffer).items():
        if isinstance(value, dict):
            found.update({f"{name}/{key}": (value, key, array) for key, array in value.items()})
    is_plain = lambda value: isinstance(value, np.ndarray) and value.dtype != object  # noqa: E731
    return {name: place for name, place in found.items() if is_plain(place[2])}


def check_buffer(buffer: ReplayBuffer, own: ReplayBuffer) -> None:
    """
    Refuse a replay buffer of another environment.

    :param buffer: the one that is to be used
    :param own: one of the right environment
    :raise ValueError: names what is different
    """
    for name in ("action_space", "observation_space", "n_envs"):
        found, expected = getattr(buffer, name), getattr(own, name)
        is_same = _same_layout(found, expected) if name == "observation_space" else found == expected
        if not is_same:
            raise ValueError(f"Invalid replay buffer: {name} is {found}, expected {expected}")


def _same_layout(space: spaces.Space, other: spaces.Space) -> bool:
    """Whether observations are stored in the same way: the bounds of a Box do not matter."""
    if isinstance(space, spaces.Dict) and isinstance(other, spaces.Dict):
        return space.keys() == other.keys() and all(_same_layout(space[key], other[key]) for key in space.keys())
    if isinstance(space, spaces.Box) and isinstance(other, spaces.Box):
        return space.shape == other.shape and space.dtype.kind == other.dtype.kind
    return space == other


def save_normalization(path: File, vec_normalize: VecNormalize) -> None:
    """
    Save the arguments and statistics of a VecNormalize without pickles.

    :param path: the file, "npz" if it has no suffix
    :param vec_normalize: the wrapper
    """
    header = {name: getattr(vec_normalize, name) for name in _NORMALIZATION_ARGUMENTS}
    header["observation_space"] = vec_normalize.venv.observation_space
    arrays = {
        f"{name}/{key}": np.asarray(getattr(statistics, key))
        for name, statistics in _find_statistics(vec_normalize).items()
        for key in _STATISTICS
    }
    save_arrays(path, "normalization", header, arrays)


def load_normalization(path: File, venv: VecEnv) -> VecNormalize:
    """
    Wrap environments as the saved VecNormalize did. No code of the file is run.

    :param path: the file
    :param venv: the environments, without normalization
    :return: the wrapper
    :raise ValueError: "PATH is damaged: ..."; or if the observations are others
    """
    header, arrays = load_arrays(path, "normalization")
    with naming_damage(path):
        space, arguments = header["observation_space"], {name: header[name] for name in _NORMALIZATION_ARGUMENTS}
    if not _same_layout(space, venv.observation_space):
        raise ValueError(f"Invalid normalization: observation_space is {space}, expected {venv.observation_space}")
    with naming_damage(path):
        # Statistics are kept where normalizing has been switched off for an evaluation
        arguments["norm_obs"] = any(name.startswith("observations") for name in arrays)
        vec_normalize = VecNormalize(venv, **arguments)
        vec_normalize.norm_obs = header["norm_obs"]
        for name, statistics in _find_statistics(vec_normalize).items():
            for key in _STATISTICS:
                array, own = arrays[f"{name}/{key}"], getattr(statistics, key)
                if array.shape != np.shape(own):
                    raise ValueError(f"{name}/{key} has shape {array.shape} instead of {np.shape(own)}")
                setattr(statistics, key, float(array) if isinstance(own, float) else array)
    return vec_normalize


def _find_statistics(vec_normalize: VecNormalize) -> dict[str, RunningMeanStd]:
    statistics = vars(vec_normalize).get("obs_rms", {})  # there are none without `norm_obs`
    named = statistics if isinstance(statistics, dict) else {"": statistics}
    return {"rewards": vec_normalize.ret_rms, **{f"observations/{key}": value for key, value in named.items()}}
