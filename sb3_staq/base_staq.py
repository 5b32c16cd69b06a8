"""The base of StaQ, without arguments and learning: acting, the pace of policy updates, SB3's conventions, files."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import LinearSchedule

from sb3_staq.action_spaces import flatten_action_space
from sb3_staq.average_trials import AverageTrials
from sb3_staq.observations import select
from sb3_staq.policies import (
    POLICY_ARGUMENTS,
    SHAPE_ARGUMENTS,
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
)
from sb3_staq.replay import PolicyReplay, cache_pays
from sb3_staq.save_util import PathOrFile


class BaseStaQ(AverageTrials):
    """The part of :class:`~sb3_staq.staq.StaQ` that does no training."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    # Arguments, see StaQ
    policy_update_interval: int
    logit_cache: bool | str
    exploration_initial_eps: float
    exploration_final_eps: float
    exploration_fraction: float

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.exploration_rate = 0.0
        self._steps_since_policy_update = 0.0
        self._steps_since_train = 0  # environment steps, from `learning_starts` on
        self._replay: PolicyReplay | None = None
        self._learns = False  # whether `learn` is running
        self._logger = Logger(None, [])  # for `train` by hand, until `learn` or `set_logger` brings another one

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_learns": False}  # of a copy, `learn` is not running

    # Acting and collecting

    @property
    def eval_policy(self) -> str:
        """The policy that acts outside training, see the argument. The policy object holds the choice."""
        policy = self.__dict__.get("policy")
        return self.__dict__["eval_policy"] if policy is None else policy.eval_policy

    @eval_policy.setter
    def eval_policy(self, eval_policy: str) -> None:
        policy = self.__dict__.get("policy")
        if policy is not None:
            policy.eval_policy = eval_policy  # which refuses unknown names
        self.__dict__["eval_policy"] = eval_policy  # saved from here, like any other argument

    @property
    def replay(self) -> PolicyReplay:
        """The replay buffer as the training sees it: with the policy at the next states."""
        assert self.replay_buffer is not None
        replay: Any = self._replay
        policy, vec_normalize = self.policy, self._vec_normalize_env
        follows = replay is not None and replay.policy is policy and replay.vec_normalize is vec_normalize
        if not follows or replay.buffer is not self.replay_buffer:  # users may have replaced these very objects
            use_cache = self.logit_cache
            if use_cache == "auto" and follows:  # as before, if a buffer was loaded
                use_cache = replay.cache is not None
            elif use_cache == "auto":
                use_cache = cache_pays(self.replay_buffer, policy, vec_normalize, self._samples_per_policy_update)
            replay = self._replay = PolicyReplay(self.replay_buffer, policy, vec_normalize, bool(use_cache))
        return replay

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Return the actions of the delivered policy, see ``eval_policy``, including exploration.

        Unless ``deterministic``, each component of an action is uniformly random with probability
        ``exploration_rate``. (With the "axis" and "joint" grids, the whole action is.)
        ``model.policy.predict`` does not explore.

        :param observation: one observation, or one for each environment
        :param state: returned as it is; the policy has no memory
        :param episode_start: not used
        :param deterministic: whether to return the most probable actions (the mean ones for a factored Box) instead of
            sampled ones
        :return: actions and ``state``
        """
        actions, state = self.policy.predict(observation, state, episode_start, deterministic)
        if not deterministic:
            shape = np.shape(actions)
            actions = actions.reshape(-1, *self.action_space.shape)  # type: ignore[misc]
            n_branches = len(self.policy.branches.sizes)
            explores = np.random.rand(len(actions), n_branches) < self.exploration_rate
            rows = explores.any(axis=1)
            if rows.any():
                # One branch for each component, or a single one for all
                components = actions.shape[1:] if n_branches > 1 else (1,) * (actions.ndim - 1)
                random_actions = self.policy.random_actions(int(rows.sum()))
                actions[rows] = np.where(explores[rows].reshape(-1, *components), random_actions, actions[rows])
            actions = actions.reshape(shape)
        return actions, state

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        policy = self.policy
        if self.num_timesteps < learning_starts:
            actions = policy.random_actions(n_envs)
        else:
            with policy.acting_by(partial(self.replay.logit_sums, remember=False)):
                actions, _ = self.predict(self._last_obs)  # type: ignore[arg-type]
            n_average = self._n_average_envs
            if n_average > 0:
                obs: Any = select(self._last_obs, slice(n_average))
                with policy.acting_by(partial(policy.logit_sums, weighting="candidate")):
                    actions[:n_average], _ = self.predict(obs)
                    # Greedily, so that its returns are those of the policy that may be delivered
                    actions[:1], _ = policy.predict(select(obs, slice(1)), deterministic=True)
        return actions, policy.scale_action(actions)

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        # collect_rollouts accepts other buffers as well
        if replay_buffer is self.replay_buffer and self.num_timesteps >= self.learning_starts:
            self.replay.remember_last()
            self._try_average(dones, infos)

    def _on_step(self) -> None:
        """Count the step, and update the exploration rate."""
        super()._on_step()
        schedule = LinearSchedule(self.exploration_initial_eps, self.exploration_final_eps, self.exploration_fraction)
        self.exploration_rate = schedule(self._current_progress_remaining)
        self._steps_since_train += max(0, min(self.n_envs, self.num_timesteps - self.learning_starts))
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # A rollout may end after total_timesteps, where a schedule that falls to 0 would be negative
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    # When policy updates are due

    def _phases(self, gradient_steps: int) -> Iterator[tuple[int, bool]]:
        """Spread the policy updates that are due over the gradient steps, at most one per step."""
        new_steps: float = self._steps_since_train
        if not self._learns:  # a rollout that was stopped may have left some steps
            new_steps = max(new_steps, gradient_steps / self._gradient_steps_per_env_step)
        self._steps_since_train = 0
        n_due, left = divmod(self._steps_since_policy_update + new_steps, self.policy_update_interval)
        n_due = min(int(n_due), gradient_steps)
        self._steps_since_policy_update = n_due * self.policy_update_interval + left
        n_phases = max(n_due, 1)
        for phase in range(n_phases):
            n_steps = gradient_steps * (phase + 1) // n_phases - gradient_steps * phase // n_phases
            yield n_steps, n_due > 0

    @property
    def _gradient_steps_per_env_step(self) -> float:
        """The ratio in ``learn``; 1 where it is not known beforehand."""
        assert isinstance(self.train_freq, TrainFreq)
        if self.gradient_steps <= 0 or self.train_freq.unit != TrainFrequencyUnit.STEP:
            return 1.0
        return self.gradient_steps / (self.train_freq.frequency * self.n_envs)

    @property
    def _samples_per_policy_update(self) -> float | None:
        """None where it is not known: with a fixed number of gradient steps per episode."""
        if self.gradient_steps >= 0 and self.train_freq.unit != TrainFrequencyUnit.STEP:  # type: ignore[union-attr]
            return None
        return self._gradient_steps_per_env_step * self.policy_update_interval * self.batch_size

    # Setting up

    @contextmanager
    def _as_sb3_needs_them(self, memory_size: int) -> Iterator[None]:
        """
        Let SB3 build the policy and the replay buffer, for flat actions and with the algorithm's arguments.

        Afterwards, the attributes are again the environment's action space and the arguments that users gave. So a
        model that is loaded with another ``n_steps`` or ``gamma`` gets a replay buffer that suits it.
        """
        names = ("action_space", "policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs")
        given = {name: getattr(self, name) for name in names}
        arguments = {name: getattr(self, name) for name in POLICY_ARGUMENTS} | {"memory_size": memory_size}
        self.action_space, self.policy_kwargs = flatten_action_space(self.action_space), self.policy_kwargs | arguments
        self.replay_buffer_kwargs = dict(self.replay_buffer_kwargs)
        try:
            yield
        finally:
            for name, value in given.items():
                setattr(self, name, value)

    # Files

    def save(
        self, path: PathOrFile, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None
    ) -> None:
        """
        Save the model in a zip file, without the replay buffer. An existing file is replaced once all is written.

        :param path: the path, or an open file
        :param exclude: names of attributes to leave out, besides those that always are
        :param include: names of attributes to save although they are normally left out
        """
        self.eval_policy = self.policy.eval_policy  # it may have been changed there
        super().save(path, exclude, include)

    @classmethod
    def _check_data(cls, data: dict[str, Any], name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if not data.keys() >= {"policy_update_interval", "kl_coef", "logit_rule"}:  # no other algorithm has these
            found = re.search(r"<function (\w+)\.", str(data.get("policy_class")))
            policy = found[1] if found else ""
            what = f"a file of {policy.removesuffix('Policy')} (its policy is {policy})" if found else "no model of SB3"
            raise ValueError(f"{name} is {what}; expected a file of StaQ")
        for argument in SHAPE_ARGUMENTS:
            given = arguments.get(argument, data.get(argument))
            if given != data.get(argument, given):
                raise ValueError(f"Invalid {argument}={given!r}: {name} is of a model with {data[argument]!r}")
        return {} if "eval_policy" in data else {"eval_policy": "last"}  # version 0.1.0 had only the last policy

    def save_replay_buffer(self, path: PathOrFile) -> None:
        """
        Save the replay buffer with the logit cache, as a pickle file with a checksum or as ".npz".

        :param path: the file
        """
        buffer, cache = self.replay_buffer, self.replay.cache
        vars(buffer)["logit_cache"] = {} if cache is None else cache.state_dict()
        try:
            super().save_replay_buffer(path)
        finally:
            del vars(buffer)["logit_cache"]

    def load_replay_buffer(self, path: PathOrFile, truncate_last_traj: bool = True, mmap: bool = False) -> None:
        """Load a replay buffer, and the logit cache if it was saved with it."""
        super().load_replay_buffer(path, truncate_last_traj, mmap)
        remembered = vars(self.replay_buffer).pop("logit_cache", {})
        if remembered and self.replay.cache is not None:
            self.replay.cache.load_state_dict(remembered)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_learns", "_replay", "_statistics", "policy_update_hooks"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in self.policy_aliases:
            raise ValueError(f"Invalid policy={policy_name!r}: expected one of {', '.join(self.policy_aliases)}")
        return self.policy_aliases[policy_name]
