"""SB3's off-policy algorithms with stricter checks. Nothing here is specific to StaQ.

Non-finite numbers are refused before they can spread, and so are files that are not complete.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping
from inspect import signature
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import BaseBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_staq.action_spaces import flatten_action_space
from sb3_staq.array_files import buffer_arrays, is_npz, load_buffer, save_buffer
from sb3_staq.observations import not_finite, place
from sb3_staq.plain_data import LEFT_OUT, PLAIN, objects_without_pickles, plain_values
from sb3_staq.save_util import PathOrFile, atomic_write, check_pickle, dump_checked, file_name, open_archive, read_data

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="CheckedOffPolicyAlgorithm")


def end_episodes(buffer: BaseBuffer) -> None:
    """Mark the episodes in a replay buffer as ended by a timeout, since the environments are about to be reset."""
    if not isinstance(buffer, ReplayBuffer):  # a class of the user's, whose rows we do not know
        return
    follow_rows = buffer.optimize_memory_usage or isinstance(buffer, (NStepReplayBuffer, HerReplayBuffer))
    if buffer.size() == 0 or not (follow_rows or buffer.handle_timeout_termination):  # would be stored as a real end
        return
    last = (buffer.pos - 1) % buffer.buffer_size
    if buffer.handle_timeout_termination:
        buffer.timeouts[last] = np.maximum(buffer.timeouts[last], 1 - buffer.dones[last])
    buffer.dones[last] = 1
    if isinstance(buffer, HerReplayBuffer):  # or goals would come from the episodes after
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it does what it is asked for
            buffer.truncate_last_trajectory()


class CheckedOffPolicyAlgorithm(OffPolicyAlgorithm):
    """An ``OffPolicyAlgorithm`` that refuses non-finite numbers and damaged files. Its arguments are the same."""

    # Statistics of VecNormalize, as they were before the last step of the environments
    _statistics: Mapping[str, Any] = MappingProxyType({})

    # What environments return must be finite before it gets into statistics, replay buffer or critics

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        self._remember_statistics()
        if self.replay_buffer is not None and (reset_num_timesteps or self._last_obs is None):
            end_episodes(self.replay_buffer)
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        assert self._last_obs is not None
        original = None if self._vec_normalize_env is None else self._last_original_obs  # what is stored
        self._check_finite("observation", self._last_obs if original is None else original)
        self._remember_statistics()
        return result

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """Collect experiences, as in SB3. After a step that a callback stopped, the next ``learn`` resets."""
        rollout = super().collect_rollouts(*args, **kwargs)
        if not rollout.continue_training:
            self._last_obs = None  # the environments are a step ahead, which SB3 has not stored
        return rollout

    def _on_step(self) -> None:
        self._remember_statistics()

    def _remember_statistics(self) -> None:
        own = {} if self._vec_normalize_env is None else vars(self._vec_normalize_env)
        names = own.keys() & {"obs_rms", "ret_rms", "returns"}
        self._statistics = {name: copy.deepcopy(own[name]) for name in names}

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        Store a step of the environments, if everything that it returned is finite.

        ``VecNormalize`` clips terminal observations before anybody else sees them, so only their NaNs are found.
        """
        normalize = self._vec_normalize_env  # it clips: check what the environments returned
        self._check_finite("reward", reward if normalize is None else normalize.get_original_reward())
        self._check_finite("observation", new_obs if normalize is None else normalize.get_original_obs())
        for i in np.flatnonzero(dones):
            self._check_finite("observation", infos[i].get("terminal_observation", ()), int(i))
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _check_finite(
        self, what: str, values: np.ndarray | dict[str, np.ndarray], env_index: int | None = None
    ) -> None:
        """
        Refuse numbers that are not finite in single precision, before they can spread.

        :param values: of all environments, or of one
        :param env_index: the environment, if they are of one
        """
        for key, array, index in not_finite(values):
            if self._vec_normalize_env is not None:
                vars(self._vec_normalize_env).update(self._statistics)
            self._last_obs = None  # the environments are a step ahead, so the next learn() resets them
            if env_index is None:
                env_index, *index = index
                array = array[env_index]
            raise ValueError(
                f"Environment {env_index} returned a non-finite {what}{place(key, index)} at step "
                f"{self.num_timesteps}: {array}; expected finite numbers in single precision. Nothing of this step was "
                "stored: the model can be saved, and learn() can be called again, which resets the environments"
            )

    # Files

    def save(
        self, path: PathOrFile, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None
    ) -> None:
        """Save the model in a zip file, as SB3 does. An existing file is replaced once all is written."""
        exclude, include = set(exclude or ()), set(include or ())
        left_out = {*LEFT_OUT, *(exclude.union(self._excluded_save_params()) - include)}  # the latter as SB3 does
        vars(self)[PLAIN] = plain_values({name: x for name, x in vars(self).items() if name not in left_out})
        with atomic_write(path, "zip") as file:
            super().save(file, exclude, include)

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfAlgorithm],
        path: PathOrFile,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        *args: Any,
        weights_only: bool = False,
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """
        Load the model from a zip file, which must be complete.

        :param path: the path, or an open file
        :param env: the environment to continue with; None is enough to predict, but not with ``HerReplayBuffer``
        :param device: "cpu", "cuda", ...; "auto" is a GPU if there is one
        :param custom_objects: objects by name that replace those in the file
        :param args: as for ``BaseAlgorithm.load``
        :param weights_only: for files from others: run no code from the file. What it holds only as code (functions,
            your own classes) must be passed as ``custom_objects`` or ``kwargs``
        :param kwargs: as for ``BaseAlgorithm.load``; also arguments to change
        :return: the model
        :raise ValueError: if the file is damaged or of another algorithm; names what ``weights_only`` needs to be given
        :raise TypeError: if there is no argument of a name in ``kwargs``
        """
        with open_archive(path, "zip") as file:
            data, name = read_data(file), file_name(path)
            kwargs = {**cls._check_data(data, name, kwargs), **kwargs}
            if "stats_window_size" in kwargs:
                kwargs["_stats_window_size"] = kwargs.pop("stats_window_size")
            known = {*data, *signature(cls.__init__).parameters, *signature(super().load).parameters}
            for unknown in kwargs.keys() - known:
                raise TypeError(f"Invalid argument {unknown}={kwargs[unknown]!r}: expected arguments of {cls.__name__}")
            if weights_only:
                given = {**dict.fromkeys(LEFT_OUT), **(custom_objects or {}), **kwargs}
                custom_objects = objects_without_pickles(data, given, name)
            return super().load(file, env, device, custom_objects, *args, **kwargs)

    @classmethod
    def _check_data(cls, data: dict[str, Any], name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Refuse unsuitable files, and return the arguments that an older version did not have."""
        return {}

    def save_replay_buffer(self, path: PathOrFile) -> None:
        """
        Save the replay buffer as a pickle file with a checksum, or as arrays if the path ends in ".npz".

        An existing file is replaced once the new one is complete.

        :param path: the file
        :raise ValueError: if an ".npz" would need more than arrays of numbers
        """
        assert self.replay_buffer is not None
        if is_npz(path):
            save_buffer(path, self.replay_buffer)
        else:
            with atomic_write(path, "pkl") as file:
                dump_checked(self.replay_buffer, file)

    def load_replay_buffer(self, path: PathOrFile, truncate_last_traj: bool = True, mmap: bool = False) -> None:
        """
        Load a replay buffer from a pickle file, or from an ".npz", which runs no code.

        If that fails, the model keeps its own buffer.

        :param path: the file
        :param truncate_last_traj: whether to end the last, unfinished episodes where they are, as if by a timeout
        :param mmap: leave the arrays of an ".npz" in the file, which is not changed, until they are used
        :raise ValueError: if the file is damaged, or its buffer is for other spaces or another number of environments
            or (without ``mmap``) has numbers that are not finite
        """
        own: Any = self.replay_buffer
        try:
            if is_npz(path):
                self.replay_buffer = load_buffer(path, own, mmap)
                if isinstance(self.replay_buffer, HerReplayBuffer) and truncate_last_traj:
                    self.replay_buffer.truncate_last_trajectory()  # with SB3's warning, as for a pickle file
            elif mmap:
                raise ValueError(f"Invalid mmap=True: {path} is no .npz")
            else:
                check_pickle(path, "pkl")
                super().load_replay_buffer(path, truncate_last_traj)
                self._check_replay_buffer(getattr(own, "n_steps", 1))
            if not mmap:
                self._check_stored_numbers()
            if truncate_last_traj and self.replay_buffer is not None:
                end_episodes(self.replay_buffer)
        except Exception as error:
            self.replay_buffer = own
            if isinstance(error, (OSError, ValueError, AssertionError, MemoryError)):
                raise
            raise ValueError(f"{path} is damaged, or no replay buffer: {error!r}") from error

    def _check_replay_buffer(self, n_steps: int) -> None:
        buffer = self.replay_buffer
        expected = {
            "action_space": flatten_action_space(self.action_space),
            "observation_space": self.observation_space,
            "n_envs": self.n_envs,
            "n_steps": n_steps,
        }
        for name, value in expected.items():
            found = getattr(buffer, name, 1)  # only buffers of n-step returns have n_steps
            if found != value:
                raise ValueError(f"Invalid replay buffer: its {name} is {found}; expected {value}")

    def _check_stored_numbers(self) -> None:
        buffer: Any = self.replay_buffer
        for path, array in buffer_arrays(buffer):
            name, _, key = path.partition("/")
            if array.shape[:2] != (buffer.buffer_size, buffer.n_envs):
                continue
            for _, _, index in not_finite(array[: buffer.size()]):
                step, env_index, *entry = index
                raise ValueError(
                    f"Invalid replay buffer: its {name}{place(key, entry)} of environment {env_index} at step {step} "
                    f"is {array[tuple(index)]}; expected finite numbers in single precision"
                )
