"""Saving and loading: what was saved comes back, training goes on as it would have, and no file is ever half."""

import io
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomObsEnv, grow, make_model, randomise, sample_obs
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_staq import MlpPolicy, MultiInputPolicy, StaQ, StaQPolicy
from sb3_staq.save_util import atomic_write, check_pickle, dump_checked, open_archive

M = 4
SIZES = [0, 1, M - 1, M, M + 2, 3 * M, 3 * M + 1]
POLICIES = {"box": "MlpPolicy", "dict": "MultiInputPolicy", "image": "CnnPolicy", "groups": "MlpPolicy"}


def make_env(kind="box"):
    """An environment with these observations; "groups" has several groups of choices."""
    if kind == "groups":
        return RandomObsEnv(action_space=spaces.MultiDiscrete([2, 3]))
    return RandomObsEnv(kind)


def grown_model(n, kind="box", **kwargs):
    """A model with n policy updates behind it."""
    model = make_model(make_env(kind), POLICIES[kind], memory_size=M, **kwargs)
    grow(model, n)
    randomise(model.policy.critics, 12345)
    randomise(model.policy.critics_target, 54321)
    return model


def observations(model, n=40):
    """As a user passes them to the policy: preprocessed to tensors, images channel-first."""
    return sample_obs(model.observation_space, n)


def assert_same_policy(actual: StaQPolicy, expected: StaQPolicy, obs):
    """Bitwise: logits, online critics, targets and weights."""
    assert len(actual.frozen_critics) == len(expected.frozen_critics)
    assert actual.frozen_critics.weights.values == expected.frozen_critics.weights.values
    assert th.equal(actual.logits(obs), expected.logits(obs))
    for name in ("critics", "critics_target"):
        assert th.equal(actual.q_values(getattr(actual, name), obs), expected.q_values(getattr(expected, name), obs)), (
            name
        )
    if len(actual.frozen_critics) > 0:
        assert expected.logits(obs).std() > 0


# Round trips


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("n", SIZES)
def test_round_trip_of_the_model(n, kind, tmp_path):
    kwargs = {} if kind != "image" else dict(policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=8)))
    model = grown_model(n, kind, **kwargs)
    model.save(tmp_path / "model.zip")
    obs = observations(model)
    loaded = StaQ.load(tmp_path / "model.zip")
    assert_same_policy(loaded.policy, model.policy, obs)
    assert loaded.policy.frozen_critics.weights.full == (n >= M)

    other = make_model(make_env(kind), POLICIES[kind], memory_size=M, **{**kwargs, "seed": 1})
    grow(other, 2, seed=100)
    other.set_parameters(tmp_path / "model.zip")
    assert_same_policy(other.policy, model.policy, obs)

    # The stack grows on in the same way
    for each in (model, loaded, other):
        grow(each, 2, seed=200)
    assert_same_policy(loaded.policy, model.policy, obs) if n else None
    assert th.equal(loaded.policy.logits(obs), model.policy.logits(obs))
    assert th.equal(other.policy.logits(obs), model.policy.logits(obs))


@pytest.mark.parametrize("n", SIZES)
def test_round_trip_of_parameters(n):
    """``get_parameters`` and ``set_parameters`` without a file."""
    model, other = grown_model(n), grown_model(2, seed=1)
    params = model.get_parameters()
    assert params.keys() == {"policy", "policy.optimizer"}
    other.set_parameters(params)
    assert_same_policy(other.policy, model.policy, observations(model))


@pytest.mark.parametrize("n", SIZES)
def test_round_trip_of_a_vector(n):
    """... of all parameters. The stack stays in its blocks of memory, in which it can be pushed on."""
    model, other = grown_model(n), grown_model(n, seed=1)
    obs = observations(model)
    other.policy.load_from_vector(model.policy.parameters_to_vector())
    assert_same_policy(other.policy, model.policy, obs)
    for each in (model, other):
        grow(each, 2, seed=200)
    assert th.equal(other.policy.logits(obs), model.policy.logits(obs))


@pytest.mark.parametrize("n", SIZES)
def test_round_trip_of_the_policy(n, tmp_path):
    model = grown_model(n)
    obs = observations(model)
    model.policy.save(tmp_path / "policy.pth")
    assert_same_policy(MlpPolicy.load(tmp_path / "policy.pth"), model.policy, obs)
    file = io.BytesIO()
    model.policy.save(file)
    file.seek(0)
    assert_same_policy(StaQPolicy.load(file), model.policy, obs)


def test_round_trip_of_the_policys_arguments(tmp_path):
    """A policy is rebuilt with everything that it was built with."""
    kwargs = dict(
        net_arch=[7],
        activation_fn=th.nn.PReLU,
        optimizer_class=th.optim.SGD,
        optimizer_kwargs=dict(momentum=0.5),
        features_extractor_kwargs=dict(cnn_output_dim=5),
    )
    env = RandomObsEnv("dict", action_space=spaces.Box(-1, 1, (2,), np.float32))
    model = StaQ(
        "MultiInputPolicy",
        env,
        action_grid="joint",
        action_bins=4,
        memory_size=3,
        n_critics=3,
        critic_reduction="min",
        logit_rule="exact",
        policy_kwargs=kwargs,
        device="cpu",
    )
    grow(model, 5)
    model.policy.save(tmp_path / "policy.pth")
    loaded = MultiInputPolicy.load(tmp_path / "policy.pth")
    assert_same_policy(loaded, model.policy, observations(model))
    assert len(loaded.frozen_critics) == 5
    assert (loaded.n_critics, loaded.critic_reduction, loaded.logit_rule) == (3, "min", "exact")
    assert loaded.branches.sizes == (16,)
    assert type(loaded.optimizer) is th.optim.SGD
    assert loaded.optimizer.param_groups[0]["momentum"] == 0.5


@pytest.mark.parametrize("n", [0, 2, M + 2])
def test_round_trip_of_custom_weights(n, tmp_path):
    """Saved are the numbers that a callable gave, not the callable."""
    model = grown_model(n, logit_rule=lambda age: 2.0 / (1 + age) - 0.7)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy.pth")
    loaded = StaQ.load(tmp_path / "model")
    policy = MlpPolicy.load(tmp_path / "policy.pth")
    assert model.logit_rule == loaded.logit_rule == policy.logit_rule == (1.3, 1.0 - 0.7, 2 / 3 - 0.7, 0.5 - 0.7)
    obs = observations(model)
    for each in (loaded.policy, policy):
        assert_same_policy(each, model.policy, obs)
    grow(model, 3, seed=200)
    grow(loaded, 3, seed=200)
    assert_same_policy(loaded.policy, model.policy, obs)


SECOND_PROCESS = """
import sys
import torch as th
th.set_num_threads(1)
from sb3_staq import MlpPolicy, StaQ
obs, *logits = th.load(sys.argv[1])
for path, expected in zip(sys.argv[2:], logits):
    policy = MlpPolicy.load(path) if path.endswith(".pth") else StaQ.load(path).policy
    assert th.equal(policy.logits(obs), expected), path
    print(len(policy.frozen_critics), expected.std().item() > 0)
"""


def test_round_trip_through_a_second_process(tmp_path):
    """Logits are bitwise equal in a process that knows only the files."""
    paths, logits = [], []
    for n in SIZES:
        model = grown_model(n)
        obs = observations(model)
        for name in ("model.zip", "policy.pth"):
            path = tmp_path / f"{n}_{name}"
            (model if name == "model.zip" else model.policy).save(path)
            paths.append(str(path))
            logits.append(model.policy.logits(obs))
    th.save([obs, *logits], tmp_path / "expected.pt")
    result = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, str(tmp_path / "expected.pt"), *paths], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == [f"{min(n, M)} {n > 0}" for n in SIZES for _ in range(2)]


def test_file_holds_the_stack_once(tmp_path):
    """The critics' parameters are float32 and are stored once, without spare capacity, at a full stack."""
    model = make_model(memory_size=40, net_arch=(64, 64))
    grow(model, 60)
    model.save(tmp_path / "model.zip")
    one_entry = sum(param.nbytes for param in model.policy.critics.parameters())
    size = (tmp_path / "model.zip").stat().st_size
    assert 42 * one_entry < size < 1.15 * 42 * one_entry  # with critics and targets


def test_parameters_load_with_weights_only(tmp_path):
    """SB3 loads with ``weights_only=True``: nothing in the file's tensors needs code of this package."""
    model = grown_model(M + 1)
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert archive.testzip() is None
        assert {"data", "policy.pth", "policy.optimizer.pth", "_stable_baselines3_version"} <= set(archive.namelist())
        params = th.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)
        assert json.loads(archive.read("data"))["memory_size"] == M
    weights = params["frozen_critics.weights"].double().sum(dim=1)
    assert weights.tolist() == model.policy.frozen_critics.weights.values


def test_exact_match(tmp_path):
    """As for every SB3 algorithm: parameters that are missing are an error, unless allowed to be."""
    model, other = grown_model(2), grown_model(1, seed=1)
    params = model.get_parameters()
    obs = observations(model)
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        other.set_parameters({"policy": params["policy"]})
    with pytest.raises(ValueError, match="invalid object name"):
        other.set_parameters({**params, "nothing": {}})
    with pytest.raises(RuntimeError, match="Missing key"):
        other.set_parameters({**params, "policy": {k: v for k, v in params["policy"].items() if "target" not in k}})
    other = grown_model(1, seed=1)
    other.set_parameters({"policy": params["policy"]}, exact_match=False)
    assert_same_policy(other.policy, model.policy, obs)


# Training goes on


class StopHalfWay(BaseCallback):
    def _on_step(self):
        return self.num_timesteps < 68


def trained_model(**kwargs):
    """
    Stopped at step 68 of 200, so that everything that training moves is half-way: coefficients, learning rate,
    exploration, counters. The fifth policy update was at step 65.
    """
    kwargs = {
        "learning_rate": lambda progress: 0.01 * progress + 1e-4,
        "ent_coef": "lin_0.5_0.1",
        "kl_coef": lambda progress: 1.0 + progress,
        "exploration_initial_eps": 0.5,
        "exploration_final_eps": 0.1,
        "exploration_fraction": 0.9,
        "buffer_size": 50,
        "policy_update_interval": 9,
        **kwargs,
    }
    model = make_model(RandomObsEnv(), **kwargs)
    model.learn(200, callback=StopHalfWay())
    return model


def reload(model, tmp_path, **kwargs):
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = StaQ.load(tmp_path / "model", env=RandomObsEnv(), **kwargs)
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.set_logger(model.logger)
    return loaded


def flat_state(model):
    """All parameters, the optimizer's moments and all weights, in one vector."""
    parts = [param.detach().flatten() for param in model.policy.parameters()]
    for state in model.policy.optimizer.state.values():
        parts += [value.detach().flatten().float() for value in state.values()]
    parts.append(th.tensor(model.policy.frozen_critics.weights.values))
    return th.cat(parts)


@pytest.mark.parametrize("logit_cache", [True, False])
def test_next_train_is_the_one_that_would_have_come(logit_cache, tmp_path):
    """
    With the replay buffer and the random state, all parameters after ``train`` are bitwise the same, also with the
    cache, whose sums are saved with the buffer. Policy updates fall on the same steps.
    """
    model = trained_model(logit_cache=logit_cache)
    loaded = reload(model, tmp_path)
    assert th.equal(flat_state(loaded), flat_state(model))
    n_updates = []
    for step in range(1, 13):
        for each in (model, loaded):
            each.num_timesteps += 3
            each._steps_since_train += 3
            each._update_current_progress_remaining(each.num_timesteps, 200)
            th.manual_seed(step)
            np.random.seed(step)
            each.train(gradient_steps=3, batch_size=16)
        n_updates.append(model.n_policy_updates)
        assert loaded.n_policy_updates == model.n_policy_updates
        assert loaded._n_updates == model._n_updates
        assert loaded._current_ent_coef == model._current_ent_coef
        assert th.equal(flat_state(loaded), flat_state(model))
    # Learning starts at 20: policy updates at 29, ..., 65; step 68 was not stored, so two steps count already
    assert n_updates == [5 + (2 + 3 * step) // 9 for step in range(1, 13)]
    assert n_updates[-1] > n_updates[0]


def test_state_of_a_loaded_model(tmp_path):
    """Counters, rates and coefficients are where they were, and schedules give what they gave."""
    model = trained_model()
    loaded = reload(model, tmp_path)
    assert 0.1 < model.exploration_rate < 0.5
    assert 0.6 < model._current_progress_remaining < 0.7
    assert 0.1 < model._current_ent_coef < 0.5
    for name in (
        "num_timesteps",
        "_n_updates",
        "n_policy_updates",
        "_steps_since_policy_update",
        "_episode_num",
        "_current_progress_remaining",
        "_current_ent_coef",
        "exploration_rate",
    ):
        assert getattr(loaded, name) == getattr(model, name), name
    assert (loaded.num_timesteps, loaded._n_updates, loaded.n_policy_updates) == (68, 47, 5)
    for progress in (1.0, 0.7, 0.0):
        assert loaded.lr_schedule(progress) == model.lr_schedule(progress)
        assert loaded._coefficients().at(progress) == pytest.approx((1.0 + progress, 0.1 + 0.4 * progress))
    learning_rate = model.policy.optimizer.param_groups[0]["lr"]
    assert loaded.policy.optimizer.param_groups[0]["lr"] == learning_rate
    assert 0.006 < learning_rate < 0.008
    assert list(loaded.ep_info_buffer) == list(model.ep_info_buffer)
    assert loaded.policy_kwargs == dict(net_arch=[16])


def test_learning_goes_on(tmp_path):
    """``reset_num_timesteps=False`` counts on from where the saved model was, with or without the replay buffer."""
    model = trained_model()
    for with_buffer in (True, False):
        loaded = reload(model, tmp_path)
        if not with_buffer:
            loaded = StaQ.load(tmp_path / "model", env=RandomObsEnv())
        before = flat_state(loaded).clone()
        loaded.learn(36, reset_num_timesteps=False)
        assert loaded.num_timesteps == 104
        assert loaded.n_policy_updates == 9
        assert not th.equal(flat_state(loaded), before)
    loaded.learn(40)  # and with a reset from the beginning
    assert loaded.num_timesteps == 40
    assert loaded.n_policy_updates == 9 + 2


def test_load_with_another_number_of_environments(tmp_path):
    model = trained_model()
    model.save(tmp_path / "model")
    env = DummyVecEnv([RandomObsEnv] * 3)
    loaded = StaQ.load(tmp_path / "model", env=env)
    assert loaded.n_envs == 3
    assert_same_policy(loaded.policy, model.policy, observations(model))
    loaded.learn(60, reset_num_timesteps=False)
    assert loaded.num_timesteps == 128
    assert loaded.replay_buffer.n_envs == 3
    assert loaded.n_policy_updates == 5 + (2 + 60) // 9


def test_load_with_other_arguments(tmp_path):
    """Keyword arguments replace what was saved, and take effect from the next policy update on."""
    model = trained_model()
    model.save(tmp_path / "model")
    obs = observations(model)
    loaded = StaQ.load(tmp_path / "model", env=RandomObsEnv(), ent_coef="lin_0.3", buffer_size=1, kl_coef=2.0)
    assert_same_policy(loaded.policy, model.policy, obs)
    assert loaded.replay_buffer.buffer_size == 1
    assert [loaded._coefficients().at(progress) for progress in (1.0, 0.5)] == [(2.0, 0.3), (2.0, 0.15)]
    loaded.learn(30, reset_num_timesteps=False)
    assert loaded.n_policy_updates == 5 + 3
    assert 0.003 <= loaded._current_ent_coef < 0.3

    larger = StaQ.load(tmp_path / "model", memory_size=9)
    assert_same_policy(larger.policy, model.policy, obs)
    assert not larger.policy.frozen_critics.weights.full
    smaller = StaQ.load(tmp_path / "model", env=RandomObsEnv(), memory_size=3)
    assert_same_policy(smaller.policy, model.policy, obs)  # up to the next policy update
    smaller.learn(20, reset_num_timesteps=False)
    assert len(smaller.policy.frozen_critics.weights) == 3
    with pytest.raises(ValueError, match=r"ent_coef=-1"):
        StaQ.load(tmp_path / "model", ent_coef=-1.0)
    with pytest.raises(ValueError, match=r"(?i)policy.kwargs"):
        StaQ.load(tmp_path / "model", policy_kwargs=dict(net_arch=[4]))


def test_custom_objects(tmp_path):
    """What cannot be deserialised elsewhere can be replaced while loading."""
    model = trained_model()
    model.save(tmp_path / "model")
    custom = dict(learning_rate=0.5, lr_schedule=lambda _: 0.5, kl_coef=7.0)
    loaded = StaQ.load(tmp_path / "model", env=RandomObsEnv(), custom_objects=custom)
    assert loaded.learning_rate == 0.5
    assert loaded._coefficients().at(1.0)[0] == 7.0
    assert_same_policy(loaded.policy, model.policy, observations(model))
    data, _, _ = load_from_zip_file(tmp_path / "model", custom_objects=custom)
    assert data["kl_coef"] == 7.0


def test_load_without_environment(tmp_path):
    """Enough for predicting; an environment can be set later."""
    model = trained_model()
    model.save(tmp_path / "model")
    loaded = StaQ.load(tmp_path / "model")
    assert loaded.get_env() is None
    obs = observations(model).numpy()
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    with pytest.raises((AssertionError, ValueError)):
        loaded.learn(10)
    loaded.set_env(RandomObsEnv())
    loaded.learn(30, reset_num_timesteps=False)
    assert loaded.n_policy_updates == 5 + 3
    with pytest.raises(ValueError, match=r"Observation spaces do not match"):
        StaQ.load(tmp_path / "model", env=gym.make("CartPole-v1"))


# Where files go


def test_paths(tmp_path, monkeypatch):
    """Strings, paths, open files, names without a suffix, with another one, and in folders that do not exist."""
    model = grown_model(2)
    obs = observations(model)
    monkeypatch.chdir(tmp_path)
    for path, file in [
        ("plain", "plain.zip"),
        (pathlib.Path("path"), "path.zip"),
        ("suffix.zip", "suffix.zip"),
        ("other.v1", "other.v1"),
        ("new/folder/model", "new/folder/model.zip"),
        (tmp_path / "absolute" / "model.zip", "absolute/model.zip"),
        (str(tmp_path / "ünï cödé"), "ünï cödé.zip"),
    ]:
        model.save(path)
        assert (tmp_path / file).is_file()
        assert_same_policy(StaQ.load(path).policy, model.policy, obs)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    assert_same_policy(StaQ.load(file).policy, model.policy, obs)
    with open("open.zip", "wb") as file:
        model.save(file)
    assert_same_policy(StaQ.load("open.zip").policy, model.policy, obs)

    model.save_replay_buffer("sub/buffer")
    assert (tmp_path / "sub/buffer.pkl").is_file()
    model.load_replay_buffer("sub/buffer")
    file = io.BytesIO()
    model.save_replay_buffer(file)
    file.seek(0)
    model.load_replay_buffer(file)
    model.policy.save("another/policy.pth")
    assert_same_policy(MlpPolicy.load("another/policy.pth"), model.policy, obs)
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name]


def test_a_folder_of_that_name(tmp_path):
    """As in SB3: the file gets another name."""
    (tmp_path / "model.zip").mkdir()
    model = grown_model(1)
    with pytest.warns(UserWarning, match="is a folder"):
        model.save(tmp_path / "model.zip")
    assert (tmp_path / "model.zip").is_dir()
    assert_same_policy(StaQ.load(tmp_path / "model.zip_2").policy, model.policy, observations(model))


def test_links_and_permissions_are_kept(tmp_path):
    """A save through a link replaces what it points to; a new file has the permissions of any new file."""
    model = grown_model(1)
    (tmp_path / "real").mkdir()
    model.save(tmp_path / "real" / "first.zip")
    (tmp_path / "link.zip").symlink_to(tmp_path / "real" / "first.zip")
    other = grown_model(3)
    other.save(tmp_path / "link.zip")
    assert (tmp_path / "link.zip").is_symlink()
    assert_same_policy(StaQ.load(tmp_path / "real" / "first.zip").policy, other.policy, observations(model))
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "real" / "first.zip").stat().st_mode == (tmp_path / "plain").stat().st_mode


def savers(model):
    """File names, and what saves to them."""
    return {"model.zip": model.save, "buffer.pkl": model.save_replay_buffer, "policy.pth": model.policy.save}


def test_existing_files_keep_their_modes(tmp_path):
    for name, save in savers(grown_model(1)).items():
        save(tmp_path / name)
        (tmp_path / name).chmod(0o600)
        save(tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users of Unix")
def test_read_only_files_are_kept():
    """Renaming another file over them would need no permission."""
    with tempfile.TemporaryDirectory() as folder:
        path, user = Path(folder) / "model.zip", os.geteuid()
        path.write_bytes(b"precious")
        path.chmod(0o444), Path(folder).chmod(0o777)
        os.seteuid(user or 65534)  # root may write to any file
        try:
            with pytest.raises(PermissionError), atomic_write(path) as file:
                file.write(b"new")
        finally:
            os.seteuid(user)
        assert path.read_bytes() == b"precious" and len(list(Path(folder).iterdir())) == 1


@pytest.mark.parametrize("suffix", [True, False])
def test_pipes_are_written_to(suffix, tmp_path):
    """... by their names as they are; what comes out is what would be in the file."""
    model = grown_model(2)
    for name, save in savers(model).items():
        pipe = tmp_path / (name if suffix else name.partition(".")[0])
        os.mkfifo(pipe)
        received = []
        reader = threading.Thread(target=lambda pipe=pipe, to=received: to.append(pipe.read_bytes()), daemon=True)
        reader.start()
        save(pipe)
        reader.join(20)
        assert pipe.is_fifo()
        assert list(tmp_path.iterdir()) == [pipe]
        pipe.unlink()
        file = io.BytesIO(received[0])
        if name == "buffer.pkl":
            model.load_replay_buffer(file)
        else:
            policy = StaQ.load(file).policy if name == "model.zip" else MlpPolicy.load(file)
            assert_same_policy(policy, model.policy, observations(model))


def test_devices_are_written_to():
    for save in savers(grown_model(1)).values():
        save("/dev/null")
    assert pathlib.Path("/dev/null").is_char_device()
    assert not [path for suffix in ("zip", "pkl") for path in pathlib.Path("/dev").glob(f"null.{suffix}")]


def test_names_as_long_as_they_may_be(tmp_path):
    for name, save in savers(grown_model(1)).items():
        path = tmp_path / name.rjust(255, "x")
        save(path)
        save(path)
        assert list(tmp_path.iterdir()) == [path]
        path.unlink()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs the list of open files that Linux has")
def test_renames_closed_files(tmp_path, monkeypatch):
    """Windows refuses to rename an open file."""
    replace = os.replace

    def replace_closed(source, target):
        opened = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
        if os.path.realpath(source) in opened:
            raise PermissionError(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_closed)
    model = make_model()
    grow(model, 2)
    for _ in range(2):
        model.save(tmp_path / "model")
        model.save_replay_buffer(tmp_path / "buffer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["buffer.pkl", "model.zip"]
    obs = sample_obs(model.observation_space, 5)
    assert th.equal(StaQ.load(tmp_path / "model").policy.logits(obs), model.policy.logits(obs))


def test_several_writers(tmp_path):
    """... at the same time, with the same process id: one of them is the last, and the others leave nothing behind."""
    models = [grown_model(n) for n in (1, 2, 3)]
    writers = [
        threading.Thread(target=lambda save=model.save: [save(tmp_path / "model") for _ in range(5)])
        for model in models
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]
    loaded = StaQ.load(tmp_path / "model")
    model = models[loaded.n_policy_updates - 1]
    assert_same_policy(loaded.policy, model.policy, observations(model))


def test_contents_are_on_the_disk_before_they_replace_a_file(tmp_path, monkeypatch):
    """Otherwise a power failure could leave an empty file in place of the old one."""
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replaced"), replace(*paths)))
    with atomic_write(tmp_path / "file") as file:
        file.write(b"12345")
    assert events == [5, "replaced"]


# Files that are damaged, or of others


def test_damaged_pickle(tmp_path):
    """Wherever a bit is wrong, it is noticed before anything is unpickled; the model keeps its buffer."""
    model = make_model(RandomObsEnv()).learn(30)
    path = tmp_path / "buffer.pkl"
    model.save_replay_buffer(path)
    content, own = path.read_bytes(), model.replay_buffer
    for place in range(0, len(content) - 80, len(content) // 100):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"buffer\.pkl is damaged: its contents do not fit its checksum"):
            model.load_replay_buffer(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"buffer\.pkl is damaged"):
        model.load_replay_buffer(path)
    assert model.replay_buffer is own


def test_damage_far_inside_a_large_pickle(tmp_path):
    """The checksum covers more than what is read at once."""
    path = tmp_path / "large.pkl"
    with open(path, "wb") as file:
        dump_checked(bytes(2**24 + 5), file)
    check_pickle(path)
    content = bytearray(path.read_bytes())
    content[2**24 + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"large\.pkl is damaged"):
        check_pickle(path)


@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("action_space", RandomObsEnv(n_actions=4)),
        ("action_space", RandomObsEnv(action_space=spaces.MultiBinary(1))),  # whose actions are stored alike
        ("observation_space", RandomObsEnv("discrete")),
        ("n_envs", DummyVecEnv([RandomObsEnv] * 2)),
    ],
)
def test_pickled_buffer_of_another_model(name, env, tmp_path):
    make_model(RandomObsEnv()).learn(30).save_replay_buffer(tmp_path / "buffer.pkl")
    with pytest.raises(ValueError, match=f"Invalid replay buffer: its {name} is .*; expected "):
        make_model(env).load_replay_buffer(tmp_path / "buffer.pkl")


def test_archives_with_a_comment(tmp_path):
    model = grown_model(2)
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip", "a") as archive:
        archive.comment = b"the best one"
    assert StaQ.load(tmp_path / "model.zip").n_policy_updates == model.n_policy_updates


@pytest.mark.parametrize("suffix", ["pkl", "npz"])
def test_too_little_memory_is_no_damage(suffix, tmp_path, monkeypatch):
    model = make_model(RandomObsEnv()).learn(30)
    model.save_replay_buffer(tmp_path / f"buffer.{suffix}")

    def out_of_memory(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(*((pickle, "load") if suffix == "pkl" else (np, "load")), out_of_memory)
    with pytest.raises(MemoryError):
        model.load_replay_buffer(tmp_path / f"buffer.{suffix}")


def test_too_little_memory_for_an_archive(tmp_path, monkeypatch):
    def fail(self):
        raise MemoryError

    grown_model(1).save(tmp_path / "model.zip")
    monkeypatch.setattr(zipfile.ZipFile, "testzip", fail)
    with pytest.raises(MemoryError):
        StaQ.load(tmp_path / "model.zip")


def test_small_pickles_have_no_checksum(tmp_path):
    """They are shorter than one."""
    for content in (b"", pickle.dumps(3)):
        (tmp_path / "small.pkl").write_bytes(content)
        check_pickle(tmp_path / "small.pkl")
        assert (tmp_path / "small.pkl").read_bytes() == content


def test_archives_behind_something_else():
    """An open file is read from where it is, and stays there."""
    file = io.BytesIO()
    file.write(b"before")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("member", b"content")
    file.seek(6)
    with open_archive(file) as opened:
        assert opened is file and file.tell() == 6


def test_pickles_behind_something_else():
    """An open file is checked from where it is, and stays there."""
    file, start = io.BytesIO(), 30
    file.write(bytes(start))
    dump_checked(list(range(100)), file)
    file.seek(start)
    check_pickle(file)
    assert file.tell() == start
    file.getbuffer()[start + 10] ^= 1
    with pytest.raises(ValueError, match="the file is damaged"):
        check_pickle(file)


def test_zip_files_that_are_no_policies(tmp_path):
    model, path = grown_model(1), tmp_path / "policy.pth"
    model.save(path)
    with pytest.raises(ValueError, match=r"policy\.pth is damaged, or no policy"):
        MlpPolicy.load(path)
    zipfile.ZipFile(path, "w").close()
    with pytest.raises(ValueError, match=r"policy\.pth is damaged, or no policy"):
        MlpPolicy.load(path)
    for other in (model.policy.state_dict(), [1], th.zeros(2)):
        th.save(other, path)
        with pytest.raises(ValueError, match=r"policy\.pth is no policy: expected a file of StaQPolicy\.save"):
            MlpPolicy.load(path)


@pytest.mark.parametrize(
    ("algorithm", "env", "name"),
    [(SAC, "Pendulum-v1", "SAC"), (DQN, "CartPole-v1", "DQN"), (PPO, "CartPole-v1", "ActorCriticPolicy")],
)
def test_models_of_other_algorithms(algorithm, env, name, tmp_path):
    """A2C has the policy of PPO."""
    algorithm("MlpPolicy", env, device="cpu", policy_kwargs=dict(net_arch=[4])).save(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"model.* is a file of .*{name}.*; expected a file of StaQ"):
        StaQ.load(tmp_path / "model")


@pytest.mark.parametrize("what", ["model", "buffer", "policy"])
def test_failed_save_leaves_the_old_file_and_nothing_else(what, tmp_path, monkeypatch):
    """An exception half-way (a full disk, say): the old file is whole and no other file is there."""
    model = grown_model(2)
    path = tmp_path / {"model": "model.zip", "buffer": "buffer.pkl", "policy": "policy.pth"}[what]
    save = {"model": model.save, "buffer": model.save_replay_buffer, "policy": model.policy.save}[what]
    save(path)
    old = path.read_bytes()
    grow(model, 2, seed=9)

    def fail(obj, file, *args, **kwargs):
        file.write(b"half of it")
        raise OSError("No space left on device")

    for target in ("torch.save", "pickle.dump"):
        monkeypatch.setattr(target, fail)
    with pytest.raises(OSError, match="No space left"):
        save(path)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "new" / path.name)
    assert path.read_bytes() == old
    assert [item.name for item in tmp_path.iterdir() if item.is_file()] == [path.name]
    assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.undo()
    save(path)
    assert path.read_bytes() != old or what == "buffer"


# Saves that are killed. The child stops in the middle of the write, says so, and waits to be killed
KILLED_CHILD = """
import sys
import torch as th
th.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
from test_save_load import grown_model
what, path = sys.argv[1:3]
model = grown_model(3)
def stop(obj, file, *args, **kwargs):
    file.write(b"half of it")
    print("writing", flush=True)
    sys.stdin.read()
if what == "buffer":
    import pickle
    pickle.dump = stop
    model.save_replay_buffer(path)
elif what == "policy":
    th.save = stop
    model.policy.save(path)
elif what == "model_late":
    import os
    os.replace = lambda *args: stop(None, open(os.devnull, "wb"))
    model.save(path)
else:
    th.save = stop
    model.save(path)
print("not killed", flush=True)
"""


@pytest.mark.parametrize("what", ["model", "model_late", "buffer", "policy"])
def test_killed_save_leaves_the_old_file(what, tmp_path):
    """SIGKILL in the middle of a save, or just before its end: the old file is as it was and loads."""
    model = grown_model(2)
    path = tmp_path / {"buffer": "buffer.pkl", "policy": "policy.pth"}.get(what, "model.zip")
    {"buffer": model.save_replay_buffer, "policy": model.policy.save}.get(what, model.save)(path)
    old = path.read_bytes()
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED_CHILD, what, str(path), str(pathlib.Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "writing\n"
        files_meanwhile = [item for item in tmp_path.iterdir() if item != path]
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdin.close()
        child.stdout.close()
    assert child.returncode == -signal.SIGKILL
    assert len(files_meanwhile) == 1  # it was writing beside the old file
    assert path.read_bytes() == old
    if what == "buffer":
        model.load_replay_buffer(path)
    elif what == "policy":
        assert_same_policy(MlpPolicy.load(path), model.policy, observations(model))
    else:
        assert_same_policy(StaQ.load(path).policy, model.policy, observations(model))
        model.save(path)  # and the next save works
        assert_same_policy(StaQ.load(path).policy, model.policy, observations(model))
    savers(model)[path.name](path)


# Files of version 0.1.0

DATA = Path(__file__).parent / "data"


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="NumPy 1 cannot read pickles of NumPy 2")
@pytest.mark.parametrize("name", ["cartpole", "pendulum"])
def test_files_of_an_older_version(name):
    """Model, policy and replay buffer load: the same logits, and the training goes on."""
    expected = np.load(DATA / f"{name}_0.1.0_expected.npz")
    obs = th.as_tensor(expected["obs"])
    env = {"cartpole": "CartPole-v1", "pendulum": "Pendulum-v1"}[name]
    model = StaQ.load(DATA / f"{name}_0.1.0.zip", env=gym.make(env), device="cpu")
    policy = MlpPolicy.load(DATA / f"{name}_0.1.0.pth", device="cpu")
    for each in (model.policy, policy):
        logits = each.frozen_critics.weights.scale * each.logit_sums(obs)
        th.testing.assert_close(logits, th.as_tensor(expected["logits"]), rtol=1e-5, atol=1e-6)
    assert model.num_timesteps == expected["steps"]
    assert len(model.policy.frozen_critics) == expected["n_frozen"]
    model.load_replay_buffer(DATA / f"{name}_0.1.0.pkl")
    n_updates = model.n_policy_updates
    model.learn(40, reset_num_timesteps=False)
    assert model.n_policy_updates > n_updates


def test_loaded_with_other_returns(tmp_path):
    """The replay buffer is made for ``n_steps`` and ``gamma`` of now, and nothing is said if they are as they were."""
    for n_steps in (1, 3):
        make_model(RandomObsEnv(), n_steps=n_steps).save(tmp_path / "model")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same = StaQ.load(tmp_path / "model")
        assert getattr(same.replay_buffer, "n_steps", 1) == n_steps
        assert StaQ.load(tmp_path / "model", n_steps=5, gamma=0.8).replay_buffer.n_steps == 5
        assert StaQ.load(tmp_path / "model", n_steps=5, gamma=0.8).replay_buffer.gamma == 0.8
        assert type(StaQ.load(tmp_path / "model", n_steps=1).replay_buffer) is ReplayBuffer


def test_arguments_of_the_user_stay():
    given = dict(n_steps=2, gamma=0.9)
    model = make_model(RandomObsEnv(), n_steps=3)
    assert model.replay_buffer_class is None and model.replay_buffer_kwargs == {}
    model = make_model(RandomObsEnv(), replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=given)
    assert model.replay_buffer_class is NStepReplayBuffer and model.replay_buffer_kwargs is given
    assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (2, 0.9)


def test_another_grid_is_refused(tmp_path):
    """It has as many bins: the parameters would fit."""
    box = spaces.Box(-1, 1, (1,), np.float32)
    make_model(RandomObsEnv(action_space=box), action_grid="axis").save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"Invalid action_grid='joint': .*model is of a model with 'axis'"):
        StaQ.load(tmp_path / "model", action_grid="joint", action_bins=3)


def test_parameters_are_copied_into_place():
    model = make_model().learn(40)
    with pytest.raises(ValueError, match="Invalid assign=True: expected False"):
        model.policy.load_state_dict(model.policy.state_dict(), assign=True)
