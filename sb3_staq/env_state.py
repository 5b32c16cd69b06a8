"""The states of environments: what a training needs besides the model to continue exactly."""

import hashlib
import inspect
import io
import os
import pickle
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

# Modules whose environments hold all of their state in attributes
KNOWN_MODULES = ("gymnasium.envs.classic_control", "gymnasium.envs.toy_text", "gymnasium.envs.mujoco")
# Attributes that are not a part of the state, and handles of other processes
NOT_STATE = ("env", "venv", "envs", "results_writer", "spec", "logger", "class_attributes")
NOT_STATE_OF_KNOWN = (*NOT_STATE, "model", "mujoco_renderer")
IN_OTHER_PROCESSES = ("processes", "remotes", "work_remotes")
# What an attribute may refer to without owning it: a copy would have no effect on the training
NOT_OWNED = (gym.Env, VecEnv, BaseAlgorithm, BaseModel, BaseBuffer, Logger)
# ... and what it owns in any case, even if an environment has the very same object
VALUES = (type(None), bool, int, float, str, bytes, tuple, list, dict, set, frozenset, np.ndarray, np.generic)


class Attributes(NamedTuple):
    """The attributes of a wrapper, a callback or an environment."""

    owner: str  # name of its class
    pickled: bytes  # all at once, since some may share an object
    digests: dict[str, str]  # of each alone
    left_out: list[str]  # those that cannot be pickled
    monitor_file: str | None
    unchanged: frozenset[str] = frozenset()  # since the start of the training


class EnvState(NamedTuple):
    """The state of an environment."""

    name: str
    wrappers: list[Attributes]
    own: Any  # None if it cannot provide it


VecEnvState = tuple[list[Attributes], list[EnvState | None]]


class _ReferenceError(pickle.PicklingError):
    """The attribute is not a part of the state."""


class _OwnPickler(pickle.Pickler):
    """Refuses everything from which something of ``NOT_OWNED``, or one of some other objects, can be reached."""

    not_owned: Collection[int] = ()  # their ids

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, NOT_OWNED) or id(value) in self.not_owned:
            raise _ReferenceError
        return NotImplemented


def _draws(value: Any) -> bool:
    """Return whether this is a surface or a clock of pygame, which need not be installed, or a collection of them."""
    if isinstance(value, (list, tuple, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return len(parts) > 0 and all(map(_draws, parts))
    kind = type(value)
    return kind.__module__.partition(".")[0] == "pygame" and kind.__name__ in ("Surface", "Clock")


def _digest(value: Any, not_owned: Collection[int]) -> str:
    """Hash the value of an attribute, if it can be copied and is not a mere reference."""
    file = io.BytesIO()
    pickler = _OwnPickler(file)
    pickler.not_owned = not_owned
    pickler.dump(value)
    pickle.loads(file.getvalue())
    return hashlib.sha256(file.getvalue()).hexdigest()


def _digests(
    owner: Any, skip: tuple[str, ...] = NOT_STATE, not_owned: Collection[int] = ()
) -> tuple[dict[str, str], list[str]]:
    """Hash each attribute that is a part of the state; return the names of those that cannot be pickled too."""
    digests, left_out = {}, []
    skip = (*skip, *IN_OTHER_PROCESSES)
    for name, value in list(vars(owner).items()):
        if name in skip or _draws(value):
            continue
        try:
            digests[name] = _digest(value, not_owned)
        except _ReferenceError:
            pass
        except Exception:  # whatever the reason, a file cannot hold it
            left_out.append(name)
    return digests, left_out


def get_attributes(owner: Any, skip: tuple[str, ...] = NOT_STATE, not_owned: Collection[int] = ()) -> Attributes:
    """Copy the attributes that can be pickled, and the contents of a monitor's file."""
    digests, left_out = _digests(owner, skip, not_owned)
    pickled = pickle.dumps({name: vars(owner)[name] for name in digests})
    writer = vars(owner).get("results_writer")
    has_file = isinstance(writer, ResultsWriter) and os.path.exists(writer.file_handler.name)
    monitor_file = Path(writer.file_handler.name).read_bytes().decode() if has_file else None
    return Attributes(type(owner).__name__, pickled, digests, left_out, monitor_file)


def _argument_names(owner: Any) -> set[str]:
    """Return the attributes that are named like arguments, and texts and paths, which are often made of them."""
    signatures = [inspect.signature(cls.__init__) for cls in type(owner).__mro__]  # type: ignore[misc]
    named = {name for signature in signatures for name in signature.parameters}
    attributes = vars(owner).items()
    return {name for name, value in attributes if name.lstrip("_") in named or isinstance(value, (str, os.PathLike))}


def set_attributes(owner: Any, state: Attributes) -> None:
    """
    Set what :func:`get_attributes` copied from an object that was made in the same way.

    If this one was made with other arguments, they take effect: it keeps what the training had not changed. Lists and
    dictionaries stay the same objects, since others may hold them. A monitor's file is restored: without rows written
    since, with those that a new start has erased.
    """
    digests, _ = _digests(owner)
    is_same = all(digests.get(name) == state.digests[name] for name in _argument_names(owner) & state.unchanged)
    keep = () if is_same else state.unchanged
    for name, value in pickle.loads(state.pickled).items():
        old = vars(owner).get(name)
        if name in keep:
            continue
        if type(old) is type(value) is list:
            old[:] = value
        elif type(old) is type(value) is dict:
            old.clear()
            old.update(value)
        else:
            vars(owner)[name] = value
    writer = vars(owner).get("results_writer")
    if isinstance(writer, ResultsWriter) and state.monitor_file is not None:
        writer.file_handler.truncate(0)
        writer.file_handler.seek(0)
        writer.file_handler.write(state.monitor_file)
        writer.file_handler.flush()


def _layers(env: gym.Env) -> Iterator[Any]:
    """Yield the wrappers of an environment, and the environment itself."""
    while env is not env.unwrapped:
        yield env
        env = env.env  # type: ignore[attr-defined]
    yield env


def _name(env: gym.Env) -> str:
    """Return the id of an environment, with its arguments if :func:`get_env_state` copies what was made of them."""
    spec = env.spec
    if spec is None:
        return type(env).__name__
    arguments = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
    return f"{spec.id} {arguments}" if arguments and type(env).__module__.startswith(KNOWN_MODULES) else spec.id


def get_env_state(env: gym.Env) -> EnvState:
    """Return the state of an environment, with its wrappers and random numbers."""
    *wrappers, unwrapped = _layers(env)
    own: Any = None
    if hasattr(unwrapped, "get_training_state"):
        own = unwrapped.get_training_state()
    elif type(unwrapped).__module__.startswith(KNOWN_MODULES):
        own = get_attributes(unwrapped, NOT_STATE_OF_KNOWN)
    # Wrappers may refer to parts of the environment, such as MuJoCo's model
    parts = {id(x) for x in vars(unwrapped).values() if not isinstance(x, VALUES)}
    return EnvState(_name(unwrapped), [get_attributes(wrapper, not_owned=parts) for wrapper in wrappers], own)


def set_env_state(env: gym.Env, state: EnvState) -> bool:
    """
    Restore the state of an environment. If it could not provide its own, only its wrappers are restored.

    :param env: an environment that was made in the same way
    :return: whether it is in that state
    """
    *wrappers, unwrapped = _layers(env)
    is_whole = state.own is not None
    for layer, attributes in zip(wrappers, state.wrappers, strict=True):
        set_attributes(layer, attributes)
        if isinstance(layer, Monitor):
            layer.needs_reset |= not is_whole
    if is_whole and hasattr(unwrapped, "set_training_state"):
        unwrapped.set_training_state(state.own)
    elif is_whole:
        set_attributes(unwrapped, state.own)
        if hasattr(unwrapped, "mujoco_renderer"):
            unwrapped.mujoco_renderer.data = unwrapped.data
    return is_whole


class TrainingState(gym.Wrapper):
    """
    Let an environment in another process, as in ``SubprocVecEnv``, give and take its state.

    :param env: the environment, with all of its other wrappers
    """

    def get_training_state(self) -> EnvState:
        """Return the state, see :func:`get_env_state`."""
        return get_env_state(self.env)

    def set_training_state(self, state: EnvState) -> bool:
        """Restore a state, see :func:`set_env_state`."""
        return set_env_state(self.env, state)


def _vec_layers(env: VecEnv) -> Iterator[VecEnv]:
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv
    yield env


def all_wrapped(env: VecEnv, wrapper_class: type[gym.Wrapper]) -> bool:
    """Return whether all environments have such a wrapper; False if they cannot tell, like those of Isaac Lab."""
    try:
        return all(env.env_is_wrapped(wrapper_class))
    except (OSError, EOFError):  # a process of theirs has died, so it is not they who cannot tell
        raise
    except Exception:  # of any kind: the VecEnv may be anyone's
        return False


def get_vec_env_state(env: VecEnv) -> VecEnvState:
    """
    Return the state of a vectorised environment.

    :return: the attributes of its wrappers, and the states of its environments, None for those out of reach
    """
    *wrappers, base = _vec_layers(env)
    states: list[Any] = [None] * base.num_envs
    if isinstance(base, DummyVecEnv):
        states = [get_env_state(single) for single in base.envs]
    elif all_wrapped(base, TrainingState):
        states = base.env_method("get_training_state")
    return [get_attributes(layer) for layer in (*wrappers, base)], states


def names_left_out(state: Any) -> set[str]:
    """Return the attributes in states, lists and tuples that could not be pickled, with their classes."""
    if isinstance(state, Attributes):
        return {f"{state.owner}.{name}" for name in state.left_out}
    parts = state if isinstance(state, (list, tuple)) else []
    return set().union(*(names_left_out(part) for part in parts))


def mark_unchanged(state: Any, start: Any) -> Any:
    """
    Mark the attributes of wrappers and callbacks that are as they were at the start of the training.

    :param state: states in lists and tuples
    :param start: the same at the start of the training
    :return: the states with the marks
    """
    if isinstance(state, Attributes):
        return state._replace(unchanged=frozenset(dict(state.digests.items() & start.digests.items())))
    if isinstance(state, EnvState):
        return state._replace(wrappers=mark_unchanged(state.wrappers, start.wrappers))
    if isinstance(state, (list, tuple)) and start is not None:
        return [mark_unchanged(*pair) for pair in zip(state, start, strict=True)]
    return state


def set_vec_env_state(env: VecEnv, state: VecEnvState) -> bool:
    """
    Restore the state of a vectorised environment.

    :param env: an environment that was made in the same way
    :return: whether all of its environments are in that state
    """
    of_layers, of_envs = state
    *wrappers, base = _vec_layers(env)
    are_whole = []
    for i, single in enumerate(of_envs):
        if single is None:
            are_whole.append(False)
        elif isinstance(base, DummyVecEnv):
            are_whole.append(set_env_state(base.envs[i], single))
        else:
            are_whole += base.env_method("set_training_state", single, indices=i)
    layers = [*wrappers, base] if all(are_whole) else wrappers
    for layer, attributes in zip(layers, of_layers, strict=False):
        set_attributes(layer, attributes)
    return all(are_whole)
