"""A training that is stopped anywhere and started again is bitwise the training that was not stopped."""

import hashlib
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
from helpers import SMALL, RandomObsEnv
from stable_baselines3 import DQN, SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_staq import StaQ
from sb3_staq.resume import ResumeCallback, TrainingState, get_env_state, set_env_state


class PickledBits(BitFlippingEnv):
    """An environment that offers its state itself."""

    def get_training_state(self):
        return {name: value for name, value in vars(self).items() if name not in ("spec",)}

    def set_training_state(self, state):
        vars(self).update(state)


HER = dict(replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(n_sampled_goal=2))
ARGUMENTS = dict(memory_size=3, buffer_size=250, batch_size=16, policy_update_interval=10, learning_starts=30)
CASES = {
    "cartpole": lambda: (make_vec_env("CartPole-v1", 1, seed=0), "MlpPolicy", dict(logit_cache=True)),
    "pendulum": lambda: (make_vec_env("Pendulum-v1", 1, seed=0), "MlpPolicy", dict(critic="joint", kl_coef="rel_0.5")),
    "several": lambda: (make_vec_env("Acrobot-v1", 3, seed=0), "MlpPolicy", dict(average_share=0.4)),
    "n_step": lambda: (make_vec_env("CartPole-v1", 2, seed=0), "MlpPolicy", dict(n_steps=3, logit_cache=True)),
    "her": lambda: (make_vec_env(PickledBits, 2, seed=0), "MultiInputPolicy", HER),
    "normalised": lambda: (VecNormalize(make_vec_env("CartPole-v1", 2, seed=0)), "MlpPolicy", dict(ent_coef="auto")),
    "mujoco": lambda: (make_vec_env("Hopper-v4", 2, seed=0), "MlpPolicy", dict(critic="joint")),
}


def make(case, **kwargs):
    env, policy, own = CASES[case]()
    arguments = {**SMALL, **ARGUMENTS, "policy_kwargs": dict(net_arch=[8]), **own, **kwargs}
    return StaQ(policy, env, **arguments)


def digest(model) -> str:
    """Of parameters, stack, optimizer, replay buffer, statistics and counters, every bit."""
    hashed = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for x in value:
                add(x)
        else:
            array = value.detach().numpy() if isinstance(value, th.Tensor) else np.asarray(value)
            hashed.update(np.ascontiguousarray(array).tobytes())

    add(model.policy.state_dict())
    add(model.policy.optimizer.state_dict()["state"])
    buffer = model.replay_buffer
    add([getattr(buffer, name) for name in ("observations", "next_observations", "actions", "rewards", "dones")])
    add([buffer.pos, model.num_timesteps, model._n_updates, model.n_policy_updates, model._episode_num])
    add([info["r"] for info in model.ep_info_buffer])
    normalize = model.get_vec_normalize_env()
    if normalize is not None:
        add([normalize.obs_rms.mean, normalize.obs_rms.var, normalize.ret_rms.var, normalize.returns])
    return hashed.hexdigest()


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


@pytest.mark.parametrize("case", CASES)
def test_goes_on_bitwise(case, tmp_path):
    """Stopped twice, at other moments than those of the checkpoints."""
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
    assert digest(model) == digest(uninterrupted)


def test_other_callbacks_go_on(tmp_path):
    """An EvalCallback comes at the steps at which it would have come, and knows the best return so far."""

    def callbacks(folder):
        evaluation = EvalCallback(
            make_vec_env("CartPole-v1", 1, seed=9), eval_freq=70, n_eval_episodes=2, log_path=str(folder), verbose=0
        )
        return [evaluation, ResumeCallback(40, folder, verbose=0)]

    make("cartpole").learn(300, callback=callbacks(tmp_path / "one"))
    with pytest.raises(KeyboardInterrupt):
        make("cartpole").learn(300, callback=[*callbacks(tmp_path / "two"), Stop(130)])
    make("cartpole").learn(300, callback=callbacks(tmp_path / "two"))
    one, two = (np.load(tmp_path / name / "evaluations.npz") for name in ("one", "two"))
    assert one["timesteps"].tolist() == two["timesteps"].tolist() == [70, 140, 210, 280]
    np.testing.assert_array_equal(one["results"], two["results"])


def test_environments_in_other_processes(tmp_path):
    """By a wrapper that gives their states."""

    def make_model():
        env = make_vec_env(
            "CartPole-v1",
            2,
            0,
            wrapper_class=TrainingState,
            vec_env_cls=SubprocVecEnv,
            vec_env_kwargs=dict(start_method="fork"),
        )
        return StaQ("MlpPolicy", env, **{**SMALL, **ARGUMENTS})

    model = make_model().learn(150)
    expected = digest(model)
    model.env.close()
    stopped = make_model()
    with pytest.raises(KeyboardInterrupt):
        stopped.learn(150, callback=[Stop(50), ResumeCallback(40, tmp_path, verbose=0)])
    stopped.env.close()
    resumed = make_model()
    resumed.learn(150, callback=ResumeCallback(40, tmp_path, verbose=0))
    assert digest(resumed) == expected
    resumed.env.close()


def test_environments_without_a_state(tmp_path, capsys):
    """New episodes begin, the old ones end as by a timeout, and it is said."""
    arguments = {**SMALL, **ARGUMENTS}
    with pytest.raises(KeyboardInterrupt):
        model = StaQ("MlpPolicy", DummyVecEnv([RandomObsEnv] * 2), **arguments)
        model.learn(200, callback=[Stop(60), ResumeCallback(50, tmp_path)])
    model = StaQ("MlpPolicy", DummyVecEnv([RandomObsEnv] * 2), **arguments)
    model.learn(200, callback=ResumeCallback(50, tmp_path))
    assert model.num_timesteps == 200
    assert "with new episodes" in capsys.readouterr().out
    step = 100 // 2
    assert (model.replay_buffer.dones[step - 1] == 1).all()


def test_other_arguments_are_refused(tmp_path):
    make("cartpole").learn(100, callback=ResumeCallback(40, tmp_path, verbose=0))
    with pytest.raises(ValueError, match=r"Invalid gamma=0.5: the checkpoint .* is of a training with 0.99"):
        make("cartpole", gamma=0.5).learn(200, callback=ResumeCallback(40, tmp_path, verbose=0))


def test_old_and_unfinished_checkpoints_go(tmp_path):
    (tmp_path / "unfinished_1").mkdir()
    make("cartpole").learn(300, callback=ResumeCallback(40, tmp_path, keep=2, verbose=0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_280", "step_300"]


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


SCRIPT = """
import sys, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, {tests!r})
import torch as th
th.set_num_threads(1)
from test_resume import ResumeCallback, digest, make
model = make({case!r}).learn(1500, callback=ResumeCallback(20, {folder!r}, verbose=0))
print(digest(model))
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["cartpole", "pendulum", "her", "normalised"])
def test_killed_at_random(case, tmp_path):
    """Five real kills at random moments, also within saves: the end is bitwise that of a process that lived."""
    rng = random.Random(0)

    def run(folder, kill_after=None):
        code = SCRIPT.format(tests=os.path.dirname(__file__), case=case, folder=str(folder))
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        if kill_after is not None:
            deadline = time.monotonic() + 60
            while not list(folder.glob("*_*")) and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.05)  # it has begun to save
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
        return process.communicate()[0].strip()

    expected = run(tmp_path / "lived")
    assert len(expected) == 64
    for _ in range(5):
        run(tmp_path / "killed", kill_after=rng.uniform(0, 1.0))
    assert run(tmp_path / "killed") == expected
