"""The states of environments: what a training that goes on exactly needs beside the model."""

import pickle
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

# Whose state is all in their attributes
KNOWN_MODULES = ("gymnasium.envs.classic_control", "gymnasium.envs.toy_text", "gymnasium.envs.mujoco")
# Attributes that belong to the process, and those that belong to the script
NOT_STATE = ("env", "venv", "envs", "model", "mujoco_renderer", "screen", "clock", "results_writer", "spec", "logger")
IN_OTHER_PROCESSES = ("processes", "remotes", "work_remotes")


def get_attributes(owner: Any, skip: tuple[str, ...] = NOT_STATE) -> dict[str, Any]:
    """
    Give the attributes that can be pickled.

    :param owner: any object
    :param skip: names to leave out
    :return: copies by name
    """
    state = {}
    for name, value in vars(owner).items():
        if name in skip or name in IN_OTHER_PROCESSES:
            continue
        try:
            state[name] = pickle.loads(pickle.dumps(value))
        except Exception:  # whatever the reason: it is nothing that a file can hold
            continue
    return state


def _layers(env: gym.Env) -> Iterator[Any]:
    """The wrappers of an environment, and the environment itself."""
    while env is not env.unwrapped:
        yield env
        env = env.env  # type: ignore[attr-defined]
    yield env


def get_env_state(env: gym.Env) -> Any:
    """
    Give the state of an environment, with its wrappers and random numbers.

    :param env: the environment
    :return: something that can be pickled; None if the environment has no way to give it
    """
    layers = list(_layers(env))
    own = getattr(env.unwrapped, "get_training_state", None)
    if own is None and not type(env.unwrapped).__module__.startswith(KNOWN_MODULES):
        return None
    states = [get_attributes(layer) for layer in layers[:-1]]
    return [*states, get_attributes(layers[-1]) if own is None else own()]


def set_env_state(env: gym.Env, state: Any) -> None:
    """
    Put an environment into a state.

    :param env: an environment of the same making
    :param state: from :func:`get_env_state`
    """
    *wrappers, unwrapped = _layers(env)
    for layer, attributes in zip(wrappers, state[:-1], strict=True):
        vars(layer).update(attributes)
    own = getattr(unwrapped, "set_training_state", None)
    if own is not None:
        own(state[-1])
    else:
        vars(unwrapped).update(state[-1])
        if hasattr(unwrapped, "mujoco_renderer"):
            unwrapped.mujoco_renderer.data = unwrapped.data


class TrainingState(gym.Wrapper):
    """
    Let an environment in another process, as those of ``SubprocVecEnv`` are, give and take its state.

    :param env: the environment
    """

    def get_training_state(self) -> Any:
        """Give the state, see :func:`get_env_state`."""
        return get_env_state(self.env)

    def set_training_state(self, state: Any) -> None:
        """Take a state, see :func:`set_env_state`."""
        set_env_state(self.env, state)


def _vec_layers(env: VecEnv) -> Iterator[VecEnv]:
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv
    yield env


def get_vec_env_state(env: VecEnv) -> tuple[list[dict[str, Any]], list[Any]]:
    """
    Give the state of a vectorised environment.

    :param env: the environment
    :return: the attributes of its wrappers, and the states of its environments, None for those that give none
    """
    *wrappers, base = _vec_layers(env)
    if isinstance(base, DummyVecEnv):
        states = [get_env_state(single) for single in base.envs]
    else:
        has = base.has_attr("get_training_state")
        states = base.env_method("get_training_state") if has else [None] * base.num_envs
    return [get_attributes(layer) for layer in (*wrappers, base)], states


def set_vec_env_state(env: VecEnv, state: tuple[list[dict[str, Any]], list[Any]]) -> bool:
    """
    Put a vectorised environment into a state, if all of its environments could give theirs.

    :param env: an environment of the same making
    :param state: from :func:`get_vec_env_state`
    :return: whether they could
    """
    of_layers, of_envs = state
    if any(single is None for single in of_envs):
        return False
    layers = list(_vec_layers(env))
    for layer, attributes in zip(layers, of_layers, strict=True):
        vars(layer).update(attributes)
    base = layers[-1]
    for i, single in enumerate(of_envs):
        if isinstance(base, DummyVecEnv):
            set_env_state(base.envs[i], single)
        else:
            base.env_method("set_training_state", single, indices=i)
    return True
