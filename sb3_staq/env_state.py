"""The states of environments: what a training needs besides the model to continue exactly."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

# Modules whose environments hold all of their state in attributes
KNOWN_MODULES = ("gymnasium.envs.classic_control", "gymnasium.envs.toy_text", "gymnasium.envs.mujoco")
# Attributes that are not a part of the state, and handles of other processes
NOT_STATE = ("env", "venv", "envs", "model", "mujoco_renderer", "screen", "clock", "results_writer", "spec", "logger")
IN_OTHER_PROCESSES = ("processes", "remotes", "work_remotes")
MONITOR_FILE = "contents of the monitor's file"


def get_attributes(owner: Any, skip: tuple[str, ...] = NOT_STATE) -> dict[str, Any]:
    """Copy the attributes that can be pickled, and the contents of a monitor's file."""
    state = {}
    for name, value in vars(owner).items():
        if name in skip or name in IN_OTHER_PROCESSES:
            continue
        try:
            state[name] = pickle.loads(pickle.dumps(value))
        except Exception:  # whatever the reason, a file cannot hold it
            continue
    writer = vars(owner).get("results_writer")
    if isinstance(writer, ResultsWriter) and os.path.exists(writer.file_handler.name):
        state[MONITOR_FILE] = Path(writer.file_handler.name).read_bytes().decode()
    return state


def set_attributes(owner: Any, state: dict[str, Any]) -> None:
    """
    Set what :func:`get_attributes` copied from an object that was made in the same way.

    A monitor's file is restored: without rows written since, with those that a new start has erased.
    """
    vars(owner).update({name: value for name, value in state.items() if name != MONITOR_FILE})
    writer = vars(owner).get("results_writer")
    if isinstance(writer, ResultsWriter) and MONITOR_FILE in state:
        writer.file_handler.truncate(0)
        writer.file_handler.seek(0)
        writer.file_handler.write(state[MONITOR_FILE])
        writer.file_handler.flush()


def _layers(env: gym.Env) -> Iterator[Any]:
    """Yield the wrappers of an environment, and the environment itself."""
    while env is not env.unwrapped:
        yield env
        env = env.env  # type: ignore[attr-defined]
    yield env


def get_env_state(env: gym.Env) -> list[Any]:
    """
    Return the state of an environment, with its wrappers and random numbers.

    :return: the states of its wrappers, and its own, which is None if it cannot provide it
    """
    *wrappers, unwrapped = _layers(env)
    own: Any = None
    if hasattr(unwrapped, "get_training_state"):
        own = unwrapped.get_training_state()
    elif type(unwrapped).__module__.startswith(KNOWN_MODULES):
        own = get_attributes(unwrapped)
    return [*map(get_attributes, wrappers), own]


def set_env_state(env: gym.Env, state: list[Any]) -> bool:
    """
    Restore the state of an environment. If it could not provide its own, only its monitors are restored.

    :param env: an environment that was made in the same way
    :return: whether it is in that state
    """
    *wrappers, unwrapped = _layers(env)
    is_whole = state[-1] is not None
    for layer, attributes in zip(wrappers, state[:-1], strict=True):
        if is_whole or isinstance(layer, Monitor):
            set_attributes(layer, attributes)
    if is_whole and hasattr(unwrapped, "set_training_state"):
        unwrapped.set_training_state(state[-1])
    elif is_whole:
        set_attributes(unwrapped, state[-1])
        if hasattr(unwrapped, "mujoco_renderer"):
            unwrapped.mujoco_renderer.data = unwrapped.data
    return is_whole


class TrainingState(gym.Wrapper):
    """
    Let an environment in another process, as in ``SubprocVecEnv``, give and take its state.

    :param env: the environment, with all of its other wrappers
    """

    def get_training_state(self) -> list[Any]:
        """Return the state, see :func:`get_env_state`."""
        return get_env_state(self.env)

    def set_training_state(self, state: list[Any]) -> bool:
        """Restore a state, see :func:`set_env_state`."""
        return set_env_state(self.env, state)


def _vec_layers(env: VecEnv) -> Iterator[VecEnv]:
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv
    yield env


def get_vec_env_state(env: VecEnv) -> tuple[list[dict[str, Any]], list[Any]]:
    """
    Return the state of a vectorised environment.

    :return: the attributes of its wrappers, and the states of its environments, None for those out of reach
    """
    *wrappers, base = _vec_layers(env)
    states: list[Any] = [None] * base.num_envs
    if isinstance(base, DummyVecEnv):
        states = [get_env_state(single) for single in base.envs]
    elif all(base.env_is_wrapped(TrainingState)):
        states = base.env_method("get_training_state")
    return [get_attributes(layer) for layer in (*wrappers, base)], states


def set_vec_env_state(env: VecEnv, state: tuple[list[dict[str, Any]], list[Any]]) -> bool:
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
