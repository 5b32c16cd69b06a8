"""A training that is stopped anywhere and started again is bitwise the training that was not stopped."""

import functools
import multiprocessing as mp
import os
import random
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.envs.classic_control import CartPoleEnv, PendulumEnv
from gymnasium.envs.toy_text import CliffWalkingEnv, FrozenLakeEnv, TaxiEnv
from gymnasium.wrappers import NormalizeObservation
from helpers import SMALL, RandomObsEnv
from sb3_contrib import RecurrentPPO
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize
from torch import nn

from benchmarks.faults import TRAININGS, digest, make
from sb3_staq import StaQ, env_state, resume
from sb3_staq.callbacks import PolicyUpdateDiagnostics
from sb3_staq.env_state import (
    TrainingState,
    get_attributes,
    get_env_state,
    get_vec_env_state,
    names_left_out,
    set_attributes,
    set_env_state,
    set_vec_env_state,
)
from sb3_staq.resume import ResumeCallback


class Stop(BaseCallback):
    """Stops the training, as a kill would, after so many calls."""

    def __init__(self, at):
        super().__init__()
        self.at, self.left = at, at

    def _on_step(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return True


def hopper():
    return make_vec_env("Hopper-v4", 2, seed=0), "MlpPolicy", {}


def assert_same(model, uninterrupted):
    """Bitwise, and with the episodes in a buffer of HER, which has their goals."""
    assert digest(model) == digest(uninterrupted)
    for name in ("ep_start", "ep_length"):
        arrays = (getattr(each.replay_buffer, name, None) for each in (model, uninterrupted))
        np.testing.assert_array_equal(*arrays)


SLOW_CASES = ("SubprocVecEnv",)
CASES = [pytest.param(x, marks=pytest.mark.slow) if x in SLOW_CASES else x for x in [*TRAININGS, "MuJoCo"]]


@pytest.mark.parametrize("case", CASES)
def test_goes_on_bitwise(case, tmp_path, monkeypatch):
    """Stopped twice, at other moments than those of the checkpoints."""
    if case == "MuJoCo":
        pytest.importorskip("mujoco", reason="needs MuJoCo")
    monkeypatch.setitem(TRAININGS, "MuJoCo", hopper)
    uninterrupted = make(case).learn(300, callback=ResumeCallback(1000, tmp_path / "none", verbose=0))
    for stop_at in (97, 58):
        model = make(case)
        steps = -(-stop_at // model.n_envs)
        with pytest.raises(KeyboardInterrupt):
            model.learn(300, callback=[Stop(steps), ResumeCallback(40, tmp_path / "all", verbose=0)])
    assert list((tmp_path / "all").iterdir())
    model = make(case)
    random.seed(7), np.random.seed(7), th.manual_seed(7)
    model.learn(300, callback=ResumeCallback(40, tmp_path / "all", verbose=0))
    assert_same(model, uninterrupted)
    if model.eval_policy == "best":
        assert model.policy.frozen_critics.marked["best"][0] > 0
        assert model._trial_step == uninterrupted._trial_step
    model.env.close(), uninterrupted.env.close()


def test_hindsight_goes_on_bitwise_within_episodes(tmp_path):
    """Checkpoints in the middle of episodes, whose steps after them belong to the same ones: their goals as well."""
    uninterrupted = make("HER").learn(200, callback=ResumeCallback(1000, tmp_path / "none", verbose=0))
    with pytest.raises(KeyboardInterrupt):
        make("HER").learn(200, callback=[Stop(40), ResumeCallback(70, tmp_path / "all", verbose=0)])
    (checkpoint,) = (tmp_path / "all").iterdir()
    assert checkpoint.name == "step_70"  # episodes have 10 steps in each of two environments
    assert_same(make("HER").learn(200, callback=ResumeCallback(70, tmp_path / "all", verbose=0)), uninterrupted)


def test_other_callbacks_go_on(tmp_path):
    """An EvalCallback comes at the steps at which it would have come, and knows the best return so far."""

    def callbacks(folder):
        evaluation = EvalCallback(
            make_vec_env("CartPole-v1", 1, seed=9), eval_freq=70, n_eval_episodes=2, log_path=str(folder), verbose=0
        )
        return [evaluation, ResumeCallback(40, folder, verbose=0)]

    make("CartPole-v1").learn(300, callback=callbacks(tmp_path / "one"))
    with pytest.raises(KeyboardInterrupt):
        make("CartPole-v1").learn(300, callback=[*callbacks(tmp_path / "two"), Stop(130)])
    make("CartPole-v1").learn(300, callback=callbacks(tmp_path / "two"))
    one, two = (np.load(tmp_path / name / "evaluations.npz") for name in ("one", "two"))
    assert one["timesteps"].tolist() == two["timesteps"].tolist() == [70, 140, 210, 280]
    np.testing.assert_array_equal(one["results"], two["results"])


APPEND = dict(override_existing=False)
OTHER_PROCESSES = dict(vec_env_cls=SubprocVecEnv, wrapper_class=TrainingState)
MONITORS = {
    "Monitor": lambda folder: make_vec_env("CartPole-v1", 2, monitor_dir=folder),
    "appending": lambda folder: make_vec_env("CartPole-v1", 2, monitor_dir=folder, monitor_kwargs=APPEND),
    "SubprocVecEnv": lambda folder: make_vec_env("CartPole-v1", 2, monitor_dir=folder, **OTHER_PROCESSES),
    "VecMonitor": lambda folder: VecMonitor(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2), f"{folder}/all"),
}


def monitored(case, folder):
    """What a process does."""
    th.set_num_threads(1)
    env = MONITORS[case](str(folder))
    arguments = {**SMALL, "gradient_steps": 1}
    StaQ("MlpPolicy", env, **arguments).learn(800, callback=ResumeCallback(150, folder / "checkpoints", verbose=0))


def episodes(folder):
    """All lines of the monitor files but the start's, the seconds apart."""
    lines = [line for path in sorted(folder.glob("*monitor.csv")) for line in path.read_text().splitlines()]
    return [line.rsplit(",", 1) for line in lines if not line.startswith("#")]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals of Unix")
@pytest.mark.parametrize("case", MONITORS)
def test_monitor_files_go_on(case, tmp_path):
    """After a kill, as if within a line, each episode stands in them once, as without a kill."""

    def start(name):
        (tmp_path / name).mkdir(exist_ok=True)
        process = mp.get_context("spawn").Process(target=monitored, args=(case, tmp_path / name))
        process.start()
        return process

    start("lived").join()
    expected = episodes(tmp_path / "lived")
    process = start("killed")
    while process.is_alive() and len(episodes(tmp_path / "killed")) < 0.6 * len(expected):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and list(tmp_path.glob("killed/checkpoints/step_*"))
    with open(next(tmp_path.glob("killed/*monitor.csv")), "a") as file:
        file.write("9.0,")
    start("killed").join()
    found = episodes(tmp_path / "killed")
    assert [row[0] for row in found] == [row[0] for row in expected] and len(found) > 10
    assert all(0 <= float(seconds) < 600 for _, seconds in found if seconds != "t")


def test_environments_without_a_state(tmp_path, capsys):
    """New episodes begin, the old ones end as by a timeout, and it is said; statistics and monitors go on."""
    arguments = {**SMALL, "buffer_size": 250}

    def make_env():
        return VecNormalize(
            make_vec_env(
                RandomObsEnv, 2, monitor_dir=str(tmp_path / "monitors"), monitor_kwargs=dict(allow_early_resets=False),
                wrapper_class=NormalizeObservation,
            )
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        model = StaQ("MlpPolicy", make_env(), **arguments)
        model.learn(200, callback=[Stop(60), ResumeCallback(50, tmp_path)])
    before, count = episodes(tmp_path / "monitors"), model.env.obs_rms.count
    model = StaQ("MlpPolicy", make_env(), **arguments)
    model.learn(200, callback=ResumeCallback(50, tmp_path))
    assert model.num_timesteps == 200
    assert "with new episodes" in capsys.readouterr().out
    step = 100 // 2
    assert (model.replay_buffer.dones[step - 1] == 1).all()
    terminated = model.replay_buffer.dones[step - 1] * (1 - model.replay_buffer.timeouts[step - 1])
    assert terminated.sum() < 2  # at most those that had ended by themselves
    assert model.env.obs_rms.count > count
    assert model.env.get_attr("obs_rms")[0].count > 100
    after = episodes(tmp_path / "monitors")
    assert sum(row in before for row in after) > 10 and len(after) > len(before)
    assert 150 < sum(int(row[0].split(",")[1]) for row in after if row[1] != "t") <= 200


class Resets(RandomObsEnv):
    """Remembers its first observations."""

    def __init__(self):
        super().__init__()
        self.first = []

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        self.first.append(obs)
        return obs, info


def test_new_episodes_begin_where_the_environments_are(tmp_path):
    """Also under VecNormalize: the replay buffer has the observations as the environments return them."""
    for steps in (60, 100):
        env = VecNormalize(DummyVecEnv([Resets]))
        model = StaQ("MlpPolicy", env, **SMALL).learn(steps, callback=ResumeCallback(40, tmp_path, verbose=0))
    before, first, *_ = env.get_attr("first")[0]  # of learn, before the checkpoint is read, and of the new episode
    assert (before != first).any()
    np.testing.assert_array_equal(model.replay_buffer.observations[60, 0], first)


def test_lstms_begin_anew_with_new_episodes(tmp_path):
    starts, ends = [], []

    class Note(BaseCallback):
        def _on_rollout_start(self):
            starts.append(self.model._last_episode_starts.tolist())

        def _on_step(self):
            return True

    for steps in (80, 120):
        arguments = dict(n_steps=20, batch_size=40, n_epochs=1, policy_kwargs=dict(net_arch=[8], lstm_hidden_size=8))
        model = RecurrentPPO("MlpLstmPolicy", DummyVecEnv([RandomObsEnv] * 2), seed=0, device="cpu", **arguments)
        model.learn(steps, callback=[Note(), ResumeCallback(1000, tmp_path, verbose=0)])
        ends.append(model._last_episode_starts.tolist())
    assert ends[0] != [True, True] == starts[2] and len(starts) == 3


def test_other_arguments_are_refused(tmp_path):
    make("CartPole-v1").learn(100, callback=ResumeCallback(40, tmp_path, verbose=0))
    with pytest.raises(ValueError, match=r"Invalid gamma=0.5: the checkpoint .* is of a training with 0.99"):
        make("CartPole-v1", gamma=0.5).learn(200, callback=ResumeCallback(40, tmp_path, verbose=0))


class OwnBuffer(ReplayBuffer):
    """Holds the same arrays as SB3's."""


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("train_freq", dict(train_freq=4)),
        ("replay_buffer_class", dict(replay_buffer_class=OwnBuffer)),
        ("policy_kwargs", dict(policy_kwargs=dict(net_arch=[9]))),
        ("replay_buffer_kwargs", dict(replay_buffer_kwargs=dict(n_sampled_goal=1))),
        ("stats_window_size", dict(stats_window_size=7)),
        ("policy_update_interval", dict(policy_update_interval=np.int64(7))),
        ("logit_rule", dict(logit_rule=(0.5, 0.3, 0.2))),
    ],
)
def test_other_rollouts_and_networks_are_refused(name, argument, tmp_path):
    case = "HER" if name == "replay_buffer_kwargs" else "CartPole-v1"
    both = dict(logit_cache=False) if name == "logit_rule" else {}
    make(case, **both).learn(100, callback=ResumeCallback(40, tmp_path, verbose=0))
    with pytest.raises(ValueError, match=rf"Invalid {name}=.*: the checkpoint .* is of a training with"):
        make(case, **both, **argument).learn(200, callback=ResumeCallback(40, tmp_path, verbose=0))


@pytest.mark.parametrize(
    ("env_id", "other", "kwargs"), [("CartPole-v1", "CartPole-v0", {}), ("Pendulum-v1", "Pendulum-v1", dict(g=9.0))]
)
def test_other_environments_are_refused(env_id, other, kwargs, tmp_path):
    def learn(env):
        StaQ("MlpPolicy", env, **SMALL).learn(50, callback=ResumeCallback(40, tmp_path, verbose=0))

    learn(gym.make(env_id, render_mode="rgb_array"))
    learn(gym.make(env_id))
    with pytest.raises(ValueError, match=rf"Invalid env=.{other}.*: the checkpoint .* of a training with '{env_id}'"):
        learn(gym.make(other, **kwargs))


def test_other_numbers_of_environments_are_refused(tmp_path):
    def learn(n_envs, n):
        model = StaQ("MlpPolicy", make_vec_env("CartPole-v1", n_envs), **SMALL)
        model.learn(n, callback=ResumeCallback(40, tmp_path, verbose=0))

    learn(1, 60)
    with pytest.raises(ValueError, match=r"Invalid n_envs=2: the checkpoint .* is of a training with 1"):
        learn(2, 90)


@pytest.mark.parametrize("value", [0, -1, 2.5, None, "1"])
@pytest.mark.parametrize("name", ["save_freq", "keep"])
def test_numbers_out_of_range(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"Invalid {name}={value!r}: expected an integer >= 1"):
        ResumeCallback(**{"save_freq": 10, "save_path": tmp_path, name: value})


@pytest.mark.parametrize("reset", [False, True])
def test_a_second_training_in_the_same_folder_is_refused(reset, tmp_path):
    model = make("Pendulum-v1").learn(150, callback=ResumeCallback(40, tmp_path, verbose=0))
    match = r"Invalid (num_timesteps|_n_updates)=\d+: .* is of a training with 0; .* save_path"
    with pytest.raises(ValueError, match=match):
        model.learn(150, callback=ResumeCallback(40, tmp_path, verbose=0), reset_num_timesteps=reset)


@pytest.mark.parametrize("wrappers", [[VecMonitor, VecNormalize], [VecNormalize, VecMonitor], [VecNormalize] * 2, []])
def test_other_wrappers_are_refused(wrappers, tmp_path):
    def learn(wrappers):
        env = make_vec_env("CartPole-v1", 1)
        for wrapper in wrappers:
            env = wrapper(env)
        StaQ("MlpPolicy", env, **SMALL).learn(60, callback=ResumeCallback(40, tmp_path, verbose=0))

    learn([VecNormalize])
    with pytest.raises(ValueError, match=r"Invalid wrappers='.*': .* is of a training with 'VecNormalize, DummyVecEnv"):
        learn(wrappers)


def test_other_attributes_and_folders_are_no_concern(tmp_path, capsys):
    """Only arguments are compared, and only folders of checkpoints are read."""
    for name in ("one", "two"):
        model = make("CartPole-v1")
        model.run_name = name
        model.learn(60, callback=ResumeCallback(40, tmp_path))
        (tmp_path / "step_60_backup").mkdir(exist_ok=True)
    assert capsys.readouterr().out == f"Training goes on from step 60 of {tmp_path / 'step_60'}, exactly where it was\n"


def test_folder_of_logs_and_verbosity_are_those_of_the_restart(tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard")
    for verbose, steps in ((0, 60), (1, 90)):
        model = make("CartPole-v1", tensorboard_log=str(tmp_path / str(verbose)), verbose=verbose)
        model.learn(steps, callback=ResumeCallback(40, tmp_path / "all", verbose=0))
    assert (model.tensorboard_log, model.verbose) == (str(tmp_path / "1"), 1)


def test_functions_go_on(tmp_path):
    """Their addresses differ in each process."""

    def make_with_functions():
        policy_kwargs = dict(net_arch=[8], activation_fn=lambda: nn.Tanh())
        return make("CartPole-v1", policy_kwargs=policy_kwargs, learning_rate=lambda _: 1e-3)

    make_with_functions().learn(100, callback=ResumeCallback(40, tmp_path, verbose=0))
    model = make_with_functions().learn(200, callback=ResumeCallback(40, tmp_path, verbose=0))
    assert model.num_timesteps == 200 and model._episode_num > 0


def test_custom_weights_go_on(tmp_path):
    arguments = dict(logit_rule=[3.0, 2.0, 1.0], logit_cache="auto")
    uninterrupted = make("CartPole-v1", **arguments).learn(200)
    with pytest.raises(KeyboardInterrupt):
        make("CartPole-v1", **arguments).learn(200, callback=[Stop(97), ResumeCallback(40, tmp_path, verbose=0)])
    model = make("CartPole-v1", **arguments).learn(200, callback=ResumeCallback(40, tmp_path, verbose=0))
    assert digest(model) == digest(uninterrupted)


class Change(BaseCallback):
    """Changes the model in the midst of the training."""

    def _on_step(self):
        if self.num_timesteps == 60:
            self.model.policy.eval_policy = "last"
            self.model.policy_update_interval, self.model.memory_size = 7, 2
        return True


def test_what_was_changed_goes_on(tmp_path):
    """The policy that is delivered, and how the stack is evaluated."""
    arguments = dict(logit_cache="auto", buffer_size=60, batch_size=32)
    uninterrupted = make("CartPole-v1", **arguments).learn(200, callback=Change())
    with pytest.raises(KeyboardInterrupt):
        callbacks = [Change(), Stop(130), ResumeCallback(40, tmp_path, verbose=0)]
        make("CartPole-v1", **arguments).learn(200, callback=callbacks)
    model = make("CartPole-v1", **arguments)
    model.learn(200, callback=[Change(), ResumeCallback(40, tmp_path, verbose=0)])
    assert model.policy.eval_policy == "last" == model.eval_policy
    assert (model.replay.cache is None) == (uninterrupted.replay.cache is None)
    assert digest(model) == digest(uninterrupted)


@pytest.mark.parametrize("order", [1, -1])
def test_diagnostics_go_on(order, tmp_path):
    """Whichever callback comes first."""

    def callbacks(folder):
        both = [PolicyUpdateDiagnostics(folder / "updates.csv"), ResumeCallback(40, folder / "all", verbose=0)]
        return both[::order]

    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
    make("CartPole-v1").learn(200, callback=callbacks(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        make("CartPole-v1").learn(200, callback=[*callbacks(tmp_path / "killed"), Stop(150)])
    make("CartPole-v1").learn(200, callback=callbacks(tmp_path / "killed"))
    lines = (tmp_path / "whole" / "updates.csv").read_text().splitlines()
    assert (tmp_path / "killed" / "updates.csv").read_text().splitlines() == lines and len(lines) > 10


def test_random_numbers_of_python_go_on(tmp_path):
    class Draw(BaseCallback):
        def _on_step(self):
            self.drawn = random.random()
            return True

    random.seed(3)
    whole, again = Draw(), Draw()
    make("CartPole-v1").learn(200, callback=whole)
    random.seed(3)
    with pytest.raises(KeyboardInterrupt):
        make("CartPole-v1").learn(200, callback=[Draw(), Stop(97), ResumeCallback(40, tmp_path, verbose=0)])
    make("CartPole-v1").learn(200, callback=[again, ResumeCallback(40, tmp_path, verbose=0)])
    assert again.drawn == whole.drawn


@pytest.mark.parametrize("order", [1, -1])
def test_random_numbers_at_the_start_of_a_training(order, tmp_path):
    """Those that other callbacks draw before the first rollout: the training goes on with its own."""

    class Draw(BaseCallback):
        def _on_training_start(self):
            np.random.rand(3), th.rand(3), random.random()

        def _on_step(self):
            return True

    def learn(folder, *more):
        callbacks = [Draw(), ResumeCallback(40, tmp_path / folder, verbose=0)][::order]
        return make("CartPole-v1").learn(200, callback=[*callbacks, *more])

    with pytest.raises(KeyboardInterrupt):
        learn("two", Stop(97))
    assert digest(learn("two")) == digest(learn("one"))


class Untold(DummyVecEnv):
    """Cannot tell its wrappers, like the environments of Isaac Lab."""

    def env_is_wrapped(self, wrapper_class, indices=None):
        raise NotImplementedError


def test_environments_that_cannot_tell_their_wrappers(tmp_path, monkeypatch):
    """Training, averages that collect, and resuming, with new episodes."""
    monkeypatch.setattr(env_state, "DummyVecEnv", SubprocVecEnv)  # as if in other processes
    for steps in (100, 200):
        env = Untold([lambda: gym.make("CartPole-v1")] * 2)
        model = StaQ("MlpPolicy", env, **SMALL, average_share=0.5)
        model.learn(steps, callback=ResumeCallback(40, tmp_path, verbose=0))
    assert model.num_timesteps == 200


def test_environments_of_other_kinds_stay_as_they_are(tmp_path, monkeypatch):
    """What they hold, if they have no state to restore, may be shared with a simulation."""
    monkeypatch.setattr(env_state, "DummyVecEnv", SubprocVecEnv)  # as if in other processes
    for steps in (60, 100):
        env = Untold([lambda: gym.make("CartPole-v1")])
        env.shared = shared = np.zeros(1)
        StaQ("MlpPolicy", env, **SMALL).learn(steps, callback=ResumeCallback(40, tmp_path, verbose=0))
    assert env.shared is shared


@pytest.mark.parametrize("error", [BrokenPipeError, EOFError])
def test_checkpoints_are_not_written_without_a_process_that_has_died(error, monkeypatch):
    """It is not that the environments cannot tell their wrappers, so their states must not be left out."""

    class Dead(DummyVecEnv):
        def env_is_wrapped(self, wrapper_class, indices=None):
            raise error

    monkeypatch.setattr(env_state, "DummyVecEnv", SubprocVecEnv)  # as if in other processes
    with pytest.raises(error):
        get_vec_env_state(Dead([lambda: gym.make("CartPole-v1")]))


def test_two_at_once_are_refused(tmp_path):
    callbacks = [ResumeCallback(20, tmp_path / "near"), ResumeCallback(100, tmp_path / "far")]
    with pytest.raises(ValueError, match="Invalid callback: expected only one ResumeCallback"):
        make("CartPole-v1").learn(100, callback=callbacks)


def test_other_environment_meanwhile(tmp_path):
    """There is no way back into it, so no checkpoint is written."""

    class SetEnv(BaseCallback):
        def _on_rollout_start(self):
            if self.num_timesteps == 60:
                self.model.set_env(make_vec_env("CartPole-v1", 1, wrapper_class=Curious))
                self.model._last_obs = self.model.env.reset()

        def _on_step(self):
            return True

    model = make("CartPole-v1")
    with pytest.warns(UserWarning, match="No checkpoint was saved"):
        model.learn(100, callback=[SetEnv(), ResumeCallback(40, tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["step_40"]


def test_damaged_checkpoints_are_refused(tmp_path):
    """Every flipped bit of what is not in the model or the replay buffer."""
    make("CartPole-v1").learn(100, callback=ResumeCallback(1000, tmp_path))
    path, rng = tmp_path / "step_100" / "rest.pkl", np.random.default_rng(0)
    whole = path.read_bytes()
    for position in rng.integers(len(whole), size=5):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"rest\.pkl is damaged"):
            make("CartPole-v1").learn(200, callback=ResumeCallback(1000, tmp_path))


SETS = """
import sys
from helpers import SMALL
from stable_baselines3.common.torch_layers import FlattenExtractor
from sb3_staq import StaQ
from sb3_staq.resume import ResumeCallback

class Skipping(FlattenExtractor):
    def __init__(self, space, skip):
        super().__init__(space)

kwargs = dict(features_extractor_class=Skipping, features_extractor_kwargs=dict(skip={"alpha", "beta", "gamma"}))
model = StaQ("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, **SMALL)
model.learn(int(sys.argv[1]), callback=ResumeCallback(40, sys.argv[2]))
"""


def test_sets_in_arguments(tmp_path):
    """Their order differs in each process."""
    for i in range(3):
        environment = {**os.environ, "PYTHONHASHSEED": str(i), "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", SETS, str(30 * i + 30), tmp_path], check=True, env=environment)


def test_random_numbers_of_fewer_gpus(monkeypatch):
    """More were visible when the checkpoint was made; PyTorch's functions are replaced, as there may be none here."""
    restored = []
    monkeypatch.setattr(th.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(th.cuda, "set_rng_state", lambda state, device: restored.append((state, device)))
    resume._set_random_states({**resume._random_states(), "cuda": ["first", "second"]})
    assert restored == [("first", 0)]


def test_speed_is_that_of_this_process(tmp_path):
    """Not all steps in the time since the restart."""
    for steps in (150, 200):
        before = time.time_ns()
        model = make("CartPole-v1").learn(steps, callback=ResumeCallback(40, tmp_path, verbose=0))
    assert model._num_timesteps_at_start == 150 and model.start_time >= before


def test_schedules_follow_the_steps_that_are_asked_for(tmp_path):
    """Also where they are more than at first."""
    progress = {}

    class Note(BaseCallback):
        def _on_rollout_start(self):
            progress[self.model.num_timesteps] = self.model._current_progress_remaining

        def _on_step(self):
            return True

    for steps in (60, 100):
        make("CartPole-v1").learn(steps, callback=[Note(), ResumeCallback(40, tmp_path, verbose=0)])
    assert progress[50] == pytest.approx(1 - 50 / 60) and progress[80] == pytest.approx(1 - 80 / 100)


def test_bad_observations_after_a_restart(tmp_path):
    """The statistics are those of the checkpoint, as they were before the step."""
    make("VecNormalize").learn(100, callback=ResumeCallback(40, tmp_path, verbose=0))
    model = make("VecNormalize")
    monitored = model.env.envs[0]
    monitored.step = lambda action: (np.full(4, np.nan, np.float32), 0.0, False, False, {})
    with pytest.raises(ValueError, match="non-finite observation"):
        model.learn(200, callback=ResumeCallback(40, tmp_path, verbose=0))
    assert model.env.obs_rms.count > 100


def test_only_what_matters_is_named(tmp_path, capsys):
    """Constants of SB3's wrappers are no loss."""
    for steps in (100, 150):
        env = VecMonitor(VecNormalize(make_vec_env("CartPole-v1", 1)))
        StaQ("MlpPolicy", env, **SMALL).learn(steps, callback=ResumeCallback(40, tmp_path))
    assert capsys.readouterr().out.endswith("exactly where it was\n")


def test_old_and_unfinished_checkpoints_go(tmp_path):
    (tmp_path / "unfinished_1").mkdir()
    make("CartPole-v1").learn(300, callback=ResumeCallback(40, tmp_path, keep=2, verbose=0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_280", "step_300"]


def test_checkpoints_come_at_multiples_of_their_interval(tmp_path):
    """Wherever the training goes on from."""
    for steps in (60, 130):
        make("CartPole-v1").learn(steps, callback=ResumeCallback(40, tmp_path, keep=9, verbose=0))
    assert {path.name for path in tmp_path.iterdir()} == {f"step_{i}" for i in (40, 60, 80, 120, 130)}


def test_failed_saves_leave_the_checkpoint_before(tmp_path, monkeypatch):
    """On a full disk, say: what is not complete is not taken for a checkpoint."""

    def learn(steps):
        return make("CartPole-v1").learn(steps, callback=ResumeCallback(40, tmp_path, verbose=0))

    def fail(value, file):
        raise OSError("No space left on device")

    learn(60)
    monkeypatch.setattr(resume, "dump_checked", fail)
    with pytest.raises(OSError, match="No space left"):
        learn(100)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_60"]
    monkeypatch.undo()
    assert learn(100).num_timesteps == 100
    assert [path.name for path in tmp_path.iterdir()] == ["step_100"]


@pytest.mark.parametrize(("end", "checkpoint"), [(98, "step_80"), (200, "step_160")])
def test_trainings_that_a_callback_ends_go_on(end, checkpoint, tmp_path):
    """SB3 does not store the step at which one says so, also if it is the last one: there is no checkpoint of it."""

    class End(BaseCallback):
        def _on_step(self):
            return self.num_timesteps < end

    make("CartPole-v1").learn(200, callback=[End(), ResumeCallback(40, tmp_path, verbose=0)])
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint]
    model = make("CartPole-v1").learn(200, callback=ResumeCallback(40, tmp_path, verbose=0))
    assert digest(model) == digest(make("CartPole-v1").learn(200))


def test_started_again_after_its_end(tmp_path):
    """The checkpoint of the end is not written again: a kill in between would leave none."""
    written = set()
    for _ in range(2):
        make("CartPole-v1").learn(60, callback=ResumeCallback(1000, tmp_path, verbose=0))
        written.add((tmp_path / "step_60" / "rest.pkl").stat().st_mtime_ns)
    assert len(written) == 1
    model = make("CartPole-v1").learn(90, callback=ResumeCallback(1000, tmp_path, verbose=0))
    assert model.num_timesteps == 90
    assert [path.name for path in tmp_path.iterdir()] == ["step_90"]


def test_other_algorithms(tmp_path):
    """SAC goes on bitwise as well, with its entropy coefficient."""

    def make_model():
        return SAC("MlpPolicy", make_vec_env("Pendulum-v1", 1, seed=0), seed=0, learning_starts=30, batch_size=16,
                   buffer_size=250, policy_kwargs=dict(net_arch=[8]), device="cpu")  # fmt: skip

    expected = make_model().learn(150)
    with pytest.raises(KeyboardInterrupt):
        make_model().learn(150, callback=[Stop(70), ResumeCallback(40, tmp_path, verbose=0)])
    model = make_model().learn(150, callback=ResumeCallback(40, tmp_path, verbose=0))
    for a, b in zip(model.policy.parameters(), expected.policy.parameters(), strict=True):
        assert th.equal(a, b)
    assert th.equal(model.log_ent_coef, expected.log_ent_coef)


@pytest.mark.parametrize("prolonged", [False, True])
def test_states_of_the_lstm_go_on(prolonged, tmp_path):
    """Across rollouts; also if more steps are asked for."""

    def learn(n, **kwargs):
        env, policy_kwargs = make_vec_env("Pendulum-v1", 2, seed=0), dict(net_arch=[8], lstm_hidden_size=8)
        arguments = dict(n_steps=20, batch_size=40, n_epochs=1, policy_kwargs=policy_kwargs)
        return RecurrentPPO("MlpLstmPolicy", env, seed=0, device="cpu", **arguments).learn(n, **kwargs)

    expected = learn(200)
    if prolonged:
        learn(120, callback=ResumeCallback(1000, tmp_path, verbose=0))
    else:
        with pytest.raises(KeyboardInterrupt):
            learn(200, callback=[Stop(70), ResumeCallback(40, tmp_path, verbose=0)])
    model = learn(200, callback=ResumeCallback(1000, tmp_path, verbose=0))
    np.testing.assert_array_equal(model._last_obs, expected._last_obs)
    for a, b in zip(model.policy.parameters(), expected.policy.parameters(), strict=True):
        assert th.equal(a, b)


def test_random_actions_go_on(tmp_path):
    """Those of DQN come from the action space, also long after the checkpoint."""

    def learn(**kwargs):
        env = make_vec_env("CartPole-v1", 1, seed=0)
        return DQN("MlpPolicy", env, seed=0, buffer_size=250, exploration_final_eps=0.5, device="cpu").learn(
            200, **kwargs
        )

    expected = learn()
    with pytest.raises(KeyboardInterrupt):
        learn(callback=[Stop(70), ResumeCallback(40, tmp_path, verbose=0)])
    model = learn(callback=ResumeCallback(40, tmp_path, verbose=0))
    np.testing.assert_array_equal(model.replay_buffer.actions, expected.replay_buffer.actions)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Ant-v4", "HalfCheetah-v4", "Walker2d-v5"])
def test_state_of_environments(env_id):
    """Steps after a state was taken are bitwise the same, observations, rewards and resets."""
    if "mujoco" in str(gym.spec(env_id).entry_point):
        pytest.importorskip("mujoco", reason="needs MuJoCo")
    env, other = gym.make(env_id), gym.make(env_id)
    env.reset(seed=0), other.reset(seed=1)
    env.action_space.seed(0)
    for _ in range(10):
        env.step(env.action_space.sample())
    set_env_state(other, get_env_state(env))
    for i in range(20):
        action = env.action_space.sample()
        one, two = (x.step(action) if i != 10 else x.reset() for x in (env, other))
        np.testing.assert_array_equal(one[0], two[0])
        assert one[1:3] == two[1:3] or i == 10


@pytest.mark.parametrize("env_class", [CartPoleEnv, PendulumEnv, FrozenLakeEnv, CliffWalkingEnv, TaxiEnv])
def test_what_an_environment_draws_with_is_not_its_state(env_class):
    """It is not missing from a checkpoint: the same frame is drawn without."""
    pytest.importorskip("pygame", reason="needs pygame")
    env, other = (env_class(render_mode="rgb_array") for _ in range(2))
    env.reset(seed=0), other.reset(seed=1)
    frame = env.render()
    state = get_env_state(env)
    assert names_left_out(state) == set()
    set_env_state(other, state)
    np.testing.assert_array_equal(other.render(), frame)
    env.mixed = [env.spec, *vars(env).values()]  # what else is in a list may be missed
    assert names_left_out(get_env_state(env)) == {f"{env_class.__name__}.mixed"}


class Remembers(gym.ObservationWrapper):
    """Keeps the last observation."""

    def observation(self, obs):
        self.seen = obs
        return obs


def test_arrays_that_wrapper_and_environment_share():
    """Unlike parts of a simulation, they are saved with the wrapper."""
    env, other = Remembers(RandomObsEnv()), Remembers(RandomObsEnv())
    env.reset(seed=0), other.reset(seed=1)
    assert env.seen is env.unwrapped._last and (env.seen != other.seen).any()
    set_env_state(other, get_env_state(env))
    np.testing.assert_array_equal(other.seen, env.seen)


def test_policies_that_wrappers_refer_to_stay_alive():
    """... such as that of the training, by whose critics one may shape rewards."""
    env, other = Remembers(RandomObsEnv()), Remembers(RandomObsEnv())
    env.policy = other.policy = policy = make("CartPole-v1").policy
    set_env_state(other, get_env_state(env))
    assert other.policy is policy


class OwnCartPole(CartPoleEnv):
    """Nothing is known of the state of an environment of another module."""


def test_environments_of_which_some_have_a_state():
    """Either all go on, or none does."""
    for second, expected in ((CartPoleEnv, True), (OwnCartPole, False)):
        env = DummyVecEnv([CartPoleEnv, second])
        env.reset()
        assert set_vec_env_state(env, get_vec_env_state(env)) is expected


class NormalisedExtractor(FlattenExtractor):
    """One with running statistics, which DQN copies to its target network by name."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.norm = nn.BatchNorm1d(self.features_dim)

    def forward(self, observations):
        return self.norm(super().forward(observations))


def test_running_statistics_go_on(tmp_path):
    """Those of DQN's batch normalisation stay those of its networks: the target network follows."""

    def learn(**kwargs):
        arguments = dict(seed=0, learning_starts=30, batch_size=16, buffer_size=250, target_update_interval=20)
        policy_kwargs = dict(net_arch=[8], features_extractor_class=NormalisedExtractor)
        env = make_vec_env("CartPole-v1", 1, seed=0)
        return DQN("MlpPolicy", env, policy_kwargs=policy_kwargs, device="cpu", **arguments).learn(150, **kwargs)

    expected = learn()
    with pytest.raises(KeyboardInterrupt):
        learn(callback=[Stop(70), ResumeCallback(40, tmp_path, verbose=0)])
    model = learn(callback=ResumeCallback(40, tmp_path, verbose=0))
    states = model.policy.state_dict(), expected.policy.state_dict()
    assert sum("running_mean" in name for name in states[0]) == 2
    for name, value in states[0].items():
        assert th.equal(value, states[1][name]), name


class Centred(gym.Wrapper):
    """Shapes the reward by the state of the inner environment."""

    def __init__(self, env):
        super().__init__(env)
        self.inside = dict(simulation=env.unwrapped)

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        return obs, reward - abs(float(self.inside["simulation"].state[0])), *rest


class Bound(gym.Wrapper):
    """Keeps methods of the inner environment."""

    def __init__(self, env):
        super().__init__(env)
        self.inner_step, self.inner_reset = env.step, functools.partial(env.reset)

    def step(self, action):
        return self.inner_step(action)

    def reset(self, **kwargs):
        return self.inner_reset(**kwargs)


class Curious(gym.Wrapper):
    """Learns a network of its own, which rewards what it does not know."""

    def __init__(self, env):
        super().__init__(env)
        self.network = nn.Linear(4, 1)
        with th.no_grad():
            self.network.weight.fill_(0.1)
            self.network.bias.fill_(0.0)
        self.optimizer = th.optim.Adam(self.network.parameters(), lr=0.01)

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        loss = self.network(th.as_tensor(obs)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return obs, reward + loss.item(), *rest


class CuriousModel(Curious):
    """The same network under a name that some of Gymnasium's environments have for something else."""

    network = property(lambda self: self.model, lambda self, value: setattr(self, "model", value))


@pytest.mark.parametrize("wrapper", [Centred, Bound, Curious, CuriousModel])
def test_what_wrappers_refer_to_stays_alive(wrapper, tmp_path):
    """Parts of the environment, and parts of each other."""

    def learn(callback):
        env = make_vec_env("CartPole-v1", 1, seed=0, wrapper_class=wrapper)
        return StaQ("MlpPolicy", env, **SMALL).learn(200, callback=callback)

    with pytest.raises(KeyboardInterrupt):
        learn([ResumeCallback(40, tmp_path, verbose=0), Stop(130)])
    assert digest(learn(ResumeCallback(40, tmp_path, verbose=0))) == digest(learn(None))


class Heavier(gym.Wrapper):
    """Changes the masses of MuJoCo's model at each step."""

    def __init__(self, env):
        super().__init__(env)
        self.model = env.unwrapped.model

    def step(self, action):
        self.model.body_mass[1] += 0.01
        return self.env.step(action)


def test_parts_of_the_simulation_stay_alive(tmp_path):
    pytest.importorskip("mujoco", reason="needs MuJoCo")
    for steps in (60, 100):
        env = make_vec_env("Hopper-v4", 1, wrapper_class=Heavier)
        StaQ("MlpPolicy", env, **SMALL).learn(steps, callback=ResumeCallback(40, tmp_path, verbose=0))
    wrapper = env.envs[0]
    assert wrapper.get_wrapper_attr("model") is wrapper.unwrapped.model
    assert wrapper.unwrapped.mujoco_renderer.data is wrapper.unwrapped.data  # or it would draw a simulation at rest


class Refer(BaseCallback):
    """Refers to parts of the training, and counts."""

    def __init__(self, env):
        super().__init__()
        self.vec_normalize, self.count = env, 0

    def _on_training_start(self):
        self.buffers, self.policies, self.loggers = [self.model.replay_buffer], [self.model.policy], [self.logger]
        self.parts = [self.model.policy.optimizer, self.model.policy.frozen_critics]

    def _on_step(self):
        self.count += 1
        return True


def test_what_callbacks_refer_to_stays_alive(tmp_path):
    for stop in ([Stop(65)], []):
        model = make("VecNormalize")
        callback = Refer(model.env)
        try:
            model.learn(200, callback=[callback, ResumeCallback(40, tmp_path, verbose=0), *stop])
        except KeyboardInterrupt:
            pass
    assert callback.vec_normalize is model.env and callback.count == 100
    (buffer,), (policy,), (logger,) = callback.buffers, callback.policies, callback.loggers
    assert policy is model.policy and logger is model.logger
    assert callback.parts[0] is policy.optimizer and callback.parts[1] is policy.frozen_critics
    assert buffer.pos == model.replay_buffer.pos == 100 and buffer.rewards is model.replay_buffer.rewards


class Begins(BaseCallback):
    """Sets itself up when the training begins, and notes the return of each step in a list of others."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows
        self.eval_env = gym.make("CartPole-v1")  # not a VecEnv, as in many callbacks that users write
        self.key = lambda row: row

    def _on_training_start(self):
        self.count = 0

    def _on_rollout_start(self):
        self.count += 1

    def _on_step(self):
        self.rows.append(self.count)
        return True


@pytest.mark.parametrize("order", [1, -1])
def test_callbacks_that_begin_anew_go_on(order, tmp_path, capsys):
    """Before and behind, and others see it. What cannot be saved is named."""

    def learn(folder, *more):
        rows = []
        make("CartPole-v1").learn(150, callback=[*[Begins(rows), ResumeCallback(40, folder)][::order], *more])
        return rows

    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "two", Stop(97))
    rows = learn(tmp_path / "two")
    assert "exactly where it was; left out, since they cannot be pickled: Begins.key\n" in capsys.readouterr().out
    assert rows == learn(tmp_path / "one") == list(range(1, 151))


class CountAll(BaseCallback):
    """Counts its calls, and writes their number to a file."""

    def __init__(self, folder):
        super().__init__()
        self.file = folder / "calls"

    def _on_step(self):
        self.file.write_text(str(self.n_calls))
        return True


def test_other_arguments_of_callbacks_take_effect(tmp_path):
    """In a new folder, as each start of the RL Zoo has one, and with longer intervals."""

    def learn(name, freq, *more):
        folder = tmp_path / name
        folder.mkdir()
        env = make_vec_env("CartPole-v1", 1, seed=9)
        arguments = dict(n_eval_episodes=1, log_path=str(folder), best_model_save_path=str(folder), verbose=0)
        evaluation = EvalCallback(env, CountAll(folder), eval_freq=freq, **arguments)
        callbacks = [evaluation, CheckpointCallback(freq, str(folder)), ResumeCallback(40, tmp_path / "all", verbose=0)]
        make("CartPole-v1").learn(300, callback=[*callbacks, *more])
        return evaluation

    with pytest.raises(KeyboardInterrupt):
        learn("one", 40, Stop(130))
    before = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    evaluation = learn("two", 100)
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == before
    assert np.load(tmp_path / "two" / "evaluations.npz")["timesteps"].tolist() == [40, 80, 120, 200, 300]
    assert {path.name for path in (tmp_path / "two").glob("rl_model*")} == {f"rl_model_{i}00_steps.zip" for i in (2, 3)}
    assert evaluation.best_mean_reward == max(map(np.mean, evaluation.evaluations_results))


def test_callbacks_within_callbacks_go_on(tmp_path):
    def learn(folder, *more):
        inner = Refer(None), Refer(None)
        evaluation = EvalCallback(make_vec_env("CartPole-v1", 1, seed=9), *inner, 2, eval_freq=20, verbose=0)
        make("CartPole-v1").learn(300, callback=[evaluation, ResumeCallback(40, folder, verbose=0), *more])
        assert all(callback.model is evaluation.model for callback in inner)
        return [callback.count for callback in inner]

    expected = learn(tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "two", Stop(250))
    assert learn(tmp_path / "two") == expected and expected[1] == 15


def test_entries_that_were_removed_are_gone():
    """What has replaced them is there, in the very list and dictionary that others may hold."""

    class Holds:
        def __init__(self):
            self.entries, self.rows = {"first": 1}, [1, 2]

    old, new = Holds(), Holds()
    del old.entries["first"], old.rows[0]
    old.entries["second"] = 2
    entries, rows = new.entries, new.rows
    set_attributes(new, get_attributes(old))
    assert new.entries is entries and entries == {"second": 2}
    assert new.rows is rows and rows == [2]


class OneWay:
    """Can be written to a file, but not be read."""

    def __reduce__(self):
        return float, ("no number",)


def test_what_could_not_be_read_is_left_out():
    """In a checkpoint, it would make all the rest useless."""

    class Holds:
        def __init__(self, count):
            self.handle, self.count = OneWay(), count

    new, state = Holds(0), get_attributes(Holds(3))
    set_attributes(new, state)
    assert new.count == 3 and state.left_out == ["handle"]


class Scaled(gym.ObservationWrapper):
    """Has arguments, what was made of them, a random number, and a count that begins with an argument."""

    def __init__(self, env, factor, count=0):
        super().__init__(env)
        self._factor, self.inverse, self.count, self.drawn = factor, 1 / factor, count, random.SystemRandom().random()

    def observation(self, obs):
        self.count += 1
        return obs * self._factor


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_other_arguments_of_wrappers_take_effect(factor, tmp_path):
    """With the same arguments, all goes on; with others, what was not changed by the training is new."""

    def learn(factor, n):
        env = make_vec_env("CartPole-v1", 1, seed=0, wrapper_class=Scaled, wrapper_kwargs=dict(factor=factor))
        StaQ("MlpPolicy", env, **SMALL).learn(n, callback=ResumeCallback(40, tmp_path, verbose=0))
        return env.envs[0]

    old, new = learn(0.5, 100), learn(factor, 200)
    assert (new._factor, new.inverse) == (factor, 1 / factor)
    assert new.count > 200 > old.count
    assert (new.drawn == old.drawn) == (factor == 0.5)
