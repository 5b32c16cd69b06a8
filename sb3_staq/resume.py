"""
Trainings that survive interruptions: checkpoints of everything, from which the same script continues when restarted.

The training continues bitwise as without the interruption (on a CPU, in one thread), if the environments can provide
their states: MuJoCo's, classic control's and toy text's can, others by two methods, ``get_training_state()`` and
``set_training_state(state)``. Without them, everything else is restored, and the environments start new episodes.
"""

import os
import pickle
import random
import re
import shutil
import warnings
from inspect import signature
from pathlib import Path
from pprint import pformat
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecEnv

from sb3_staq.arguments import CALLBACK_ARGUMENTS, check_argument
from sb3_staq.env_state import (
    get_attributes,
    get_vec_env_state,
    mark_unchanged,
    names_left_out,
    set_attributes,
    set_vec_env_state,
)
from sb3_staq.off_policy import CheckedOffPolicyAlgorithm, end_episodes
from sb3_staq.save_util import check_pickle, dump_checked

NOT_OF_THE_MODEL = (
    *("action_space", "device", "n_envs", "observation_space", "policy_class", "policy_kwargs"),
    *("start_time", "tensorboard_log", "verbose", "_total_timesteps"),
)
NOT_COMPARED = {"tensorboard_log", "verbose"}
COMPARED_BY_TEXT = {"policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs", "train_freq"}
NOT_OF_CALLBACKS = (
    *("callback", "callbacks", "eval_env", "training_env", "model", "parent"),
    *("globals", "locals", "logger", "pbar"),
)


def _random_states() -> dict[str, Any]:
    cuda = th.cuda.get_rng_state_all() if th.cuda.is_available() else []
    return dict(python=random.getstate(), numpy=np.random.get_state(), torch=th.get_rng_state(), cuda=cuda)


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"])
    for i, state in enumerate(states["cuda"][: th.cuda.device_count()]):
        th.cuda.set_rng_state(state, i)


class ResumeCallback(BaseCallback):
    """
    Save checkpoints regularly, and continue from the newest complete one when the same script is started again.

    It saves between two rollouts, where nothing is in flight: the model, the replay buffer with the logit cache,
    wrappers with their statistics, environments, callbacks, and the states of all random number generators. Whatever
    happens during a save, the newest complete checkpoint is kept. It works with any SB3 algorithm; only ARS and
    ``use_sde=True`` do not continue bitwise. The files are pickles, so load only your own.

    Example::

        StaQ("MlpPolicy", env, seed=0).learn(1_000_000, callback=ResumeCallback(10_000, "checkpoints"))

    :param save_freq: environment steps between two checkpoints
    :param save_path: folder of the checkpoints of this training, and of no other
    :param keep: number of checkpoints to keep
    :param verbose: Verbosity level: 1 reports from where a training continues
    :raise ValueError: if the checkpoint is of a training with other arguments, or in another environment. Functions,
        such as schedules, cannot be compared: those of the checkpoint are used. Other arguments of callbacks and
        wrappers take effect
    """

    def __init__(self, save_freq: int, save_path: str | Path, keep: int = 1, verbose: int = 1):
        super().__init__(verbose)
        check_argument("save_freq", save_freq, CALLBACK_ARGUMENTS)
        check_argument("keep", keep, CALLBACK_ARGUMENTS)
        self.save_freq = save_freq
        self.save_path = Path(save_path)
        self.keep = keep
        self._next_save = save_freq
        self._in_rollout = False

    def _checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        steps = {path: path.name.removeprefix("step_") for path in self.save_path.glob("step_*")}
        return sorted((path for path in steps if steps[path].isdigit()), key=lambda path: int(steps[path]))

    def _on_training_start(self) -> None:
        self._others = self._other_callbacks()
        if any(isinstance(callback, ResumeCallback) for callback in self._others):
            raise ValueError("Invalid callback: expected only one ResumeCallback, from whose checkpoints to continue")
        self._of_callbacks: list[Any] = []
        self._random: dict[str, Any] | None = None
        self._env = self.model.env
        self._start = self._states()
        self._arguments = self._own_arguments()
        if self._checkpoints():
            self._resume(self._checkpoints()[-1])
        self._next_save = (self.model.num_timesteps // self.save_freq + 1) * self.save_freq

    def _on_rollout_start(self) -> None:
        self._restore_rest()  # again, as callbacks behind this one have had their `_on_training_start` since
        self._of_callbacks, self._random = [], None
        if self.model.num_timesteps >= self._next_save:
            self._next_save = (self.model.num_timesteps // self.save_freq + 1) * self.save_freq
            self.save()
        self._in_rollout = True

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._in_rollout = False

    def _on_training_end(self) -> None:
        if not self._in_rollout:  # otherwise a callback has stopped it, and SB3 has not stored that step
            self.save()

    def _path(self) -> Path:
        """Return the path of a complete checkpoint of this step."""
        return self.save_path / f"step_{self.model.num_timesteps}"

    def _own_arguments(self) -> dict[str, Any]:
        """Return the arguments that can be compared: plain values, and others by their text; and where it begins."""
        kinds, attributes = (bool, int, float, str, tuple, np.number, type(None)), vars(self.model)
        signatures = [signature(cls.__init__) for cls in type(self.model).__mro__]  # type: ignore[misc]
        names = {name for found in signatures for name in found.parameters} - NOT_COMPARED
        names |= {"n_envs", "num_timesteps", "_n_updates"}
        plain = {name: attributes[name] for name in names & attributes.keys() if isinstance(attributes[name], kinds)}
        for name in COMPARED_BY_TEXT & attributes.keys():
            text = re.sub(" at 0x[0-9a-f]+", "", pformat(attributes[name], width=1))  # which sorts sets
            plain[name] = " ".join(text.split())
        plain["stats_window_size"] = self.model._stats_window_size
        layers, singles = self._start[0]
        singles = [single for single in singles if single is not None]
        if singles:
            plain["env"] = ", ".join(dict.fromkeys(single.name for single in singles))
        plain["wrappers"] = ", ".join(x.owner for x in (*layers, *(singles[0].wrappers if singles else [])))
        return plain

    def _other_callbacks(self) -> list[BaseCallback]:
        """Return all other callbacks of the training, also those that others hold, in a fixed order."""
        found: list[BaseCallback] = []
        todo = [self.locals["callback"]]
        while todo:
            callback = todo.pop()
            if isinstance(callback, BaseCallback) and callback not in found:
                found.append(callback)
                for value in vars(callback).values():
                    todo += value if isinstance(value, list) else [value]
        return [callback for callback in found if callback is not self]

    def _states(self) -> tuple[Any, list[Any]]:
        """Return the states of environments and callbacks."""
        assert self.model.env is not None
        of_callbacks = []
        policy = self.model.policy
        parts = {id(part) for part in (*policy.modules(), *policy.parameters())}  # which callbacks may refer to
        for callback in self._others:
            eval_env = getattr(callback, "eval_env", None)
            of_eval_env = get_vec_env_state(eval_env) if isinstance(eval_env, VecEnv) else None
            of_callbacks.append((get_attributes(callback, NOT_OF_CALLBACKS, parts), of_eval_env))
        return get_vec_env_state(self.model.env), of_callbacks

    def save(self) -> None:
        """Save a checkpoint, which gets its name only once it is complete, unless there is one of this step."""
        if self._path().exists():  # such as that of a finished training that was started again
            return
        if self.model.env is not self._env:
            warnings.warn("No checkpoint was saved, as it could not be restored: another environment was set meanwhile")
            return
        model, unfinished = self.model, self.save_path / f"unfinished_{os.getpid()}"
        for path in self.save_path.glob("unfinished_*"):
            shutil.rmtree(path, ignore_errors=True)
        unfinished.mkdir(parents=True)
        model.save(unfinished / "model.zip", include=["_last_lstm_states"])  # RecurrentPPO leaves them out
        if hasattr(model, "save_replay_buffer"):
            model.save_replay_buffer(unfinished / "replay_buffer.pkl")
        rest = dict(
            arguments=self._arguments,
            states=mark_unchanged(self._states(), self._start),
            random=_random_states(),
        )
        with (unfinished / "rest.pkl").open("wb") as file:
            dump_checked(rest, file)
        for path in unfinished.iterdir():  # all of it must be on the disk before the older ones are deleted
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        unfinished.rename(self._path())
        for path in self._checkpoints()[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)

    def _resume(self, checkpoint: Path) -> None:
        model: Any = self.model
        check_pickle(checkpoint / "rest.pkl")
        rest = pickle.loads((checkpoint / "rest.pkl").read_bytes())
        for name, value in rest["arguments"].items():
            if self._arguments.get(name, value) != value:
                raise ValueError(
                    f"Invalid {name}={self._arguments[name]!r}: the checkpoint {checkpoint} is of a training with "
                    f"{value!r}; expected the same, or another save_path, as each call of learn() needs"
                )
        data, params, variables = load_from_zip_file(checkpoint / "model.zip", device=model.device)
        assert data is not None and params is not None
        for name, value in data.items():
            # Statistics of batch normalisation are a part of the networks, which are loaded below
            if name not in NOT_OF_THE_MODEL and "batch_norm_stats" not in name:
                was_tuple = isinstance(getattr(model, name, None), tuple) and isinstance(value, list)  # JSON has none
                setattr(model, name, tuple(value) if was_tuple else value)
        model.set_parameters(params, exact_match=True, device=model.device)
        for name, value in (variables or {}).items():
            if value is not None:
                getattr(model, name).data = value.data
        if (checkpoint / "replay_buffer.pkl").exists():
            buffer = model.replay_buffer
            model.load_replay_buffer(checkpoint / "replay_buffer.pkl", truncate_last_traj=False)
            buffer.__dict__ = vars(model.replay_buffer)  # callbacks may refer to the old object: it becomes the same
        left_out = names_left_out(rest["states"])
        of_env, left = rest["states"]
        for callback in self._others:
            state = next((state for state in left if state[0].owner == type(callback).__name__), None)
            if state is not None:
                left.remove(state)
                self._of_callbacks.append((callback, *state))
        exact = set_vec_env_state(model.env, of_env)
        model.action_space = model.env.action_space  # the environment's own object, whose random numbers continue
        how = "exactly where it was"
        if not exact:
            self._begin_episodes_anew(model)
            how = "with new episodes, since the environments cannot give their states"
        if left_out:
            how += f"; left out, since they cannot be pickled: {', '.join(sorted(left_out))}"
        self._random = rest["random"]
        self._restore_rest()
        model._num_timesteps_at_start = model.num_timesteps  # from which it logs the speed
        if isinstance(model, CheckedOffPolicyAlgorithm):
            model._remember_statistics()
        if self.verbose >= 1:
            print(f"Training goes on from step {model.num_timesteps} of {checkpoint}, {how}")

    def _restore_rest(self) -> None:
        """Restore what other callbacks may change before the first rollout: themselves, and the random numbers."""
        for callback, attributes, of_eval_env in self._of_callbacks:
            set_attributes(callback, attributes)
            if of_eval_env is not None:
                set_vec_env_state(callback.eval_env, of_eval_env)
        if self._random is not None:
            _set_random_states(self._random)

    @staticmethod
    def _begin_episodes_anew(model: BaseAlgorithm) -> None:
        """Start new episodes; in the replay buffer, the old ones end as if by a timeout."""
        assert model.env is not None
        buffer: Any = getattr(model, "replay_buffer", None)
        if buffer is not None:
            end_episodes(buffer)
        model._last_obs = model.env.reset()  # type: ignore[assignment]
        model._last_episode_starts = np.ones(model.n_envs, dtype=bool)
        if model._vec_normalize_env is not None:
            model._last_original_obs = model._vec_normalize_env.get_original_obs()
