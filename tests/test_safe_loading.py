"""Files without pickles: nothing in them is run, and everything that this package has saved comes back."""

import base64
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomObsEnv, make_model, sample_obs
from rl_zoo3.utils import SimpleLinearSchedule
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.her import HerReplayBuffer

from sb3_staq import StaQ, StaQPolicy
from sb3_staq.array_files import load_vec_normalize, save_vec_normalize
from sb3_staq.minatar import MinAtarPolicy
from sb3_staq.plain_data import from_json, to_json

DATA = Path(__file__).parent / "data"
HER = dict(replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(n_sampled_goal=2))
BOX = spaces.Box(-1, 2, (2,), np.float32)
ADAM = dict(optimizer_class=th.optim.Adam, optimizer_kwargs=dict(betas=(0.8, 0.9)))
KINDS = {
    "box": ("MlpPolicy", lambda: RandomObsEnv("box"), dict(logit_cache=True)),
    "dict": ("MultiInputPolicy", lambda: RandomObsEnv("dict"), dict(logit_cache=True)),
    "image": ("CnnPolicy", lambda: RandomObsEnv("image"), dict(policy_kwargs=dict(activation_fn=th.nn.Tanh))),
    "branches": ("MlpPolicy", lambda: RandomObsEnv(action_space=spaces.MultiDiscrete([2, 3])), {}),
    "binary": ("MlpPolicy", lambda: RandomObsEnv(action_space=spaces.MultiBinary(2)), dict(logit_rule="exact")),
    "joint": ("MlpPolicy", lambda: RandomObsEnv(action_space=BOX), dict(critic="joint", kl_coef="rel_0.5")),
    "optimizer": ("MlpPolicy", RandomObsEnv, dict(policy_kwargs=ADAM, learning_rate=LinearSchedule(0.01, 0.001, 0.5))),
    "weights": ("MlpPolicy", RandomObsEnv, dict(logit_rule=lambda age: 1 / (1 + age), train_freq=(2, "step"))),
    "n_step": ("MlpPolicy", lambda: DummyVecEnv([RandomObsEnv] * 2), dict(n_steps=3)),
    "her": ("MultiInputPolicy", lambda: BitFlippingEnv(4), HER),
    "compact": ("MlpPolicy", RandomObsEnv, dict(buffer_size=50, optimize_memory_usage=True, logit_cache=True)),
}


def trained(kind="box", **kwargs):
    policy, make_env, own = KINDS[kind]
    if kind == "compact":
        kwargs["replay_buffer_kwargs"] = dict(handle_timeout_termination=False)
    return make_model(make_env(), policy, **{**own, **kwargs}).learn(80)


def logits(policy: StaQPolicy) -> th.Tensor:
    return policy.logits(sample_obs(policy.observation_space, 20))


def state(model) -> th.Tensor:
    moments = [x.flatten().float() for each in model.policy.optimizer.state.values() for x in each.values()]
    return th.cat([x.flatten() for x in model.policy.state_dict().values()] + moments)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    """Without pickles the same model comes back as with them, and the training goes on bitwise as with them."""
    model = trained(kind)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy.pth")
    for suffix in ("pkl", "npz"):
        model.save_replay_buffer(tmp_path / f"buffer.{suffix}")
    usual, safe, mapped = (
        StaQ.load(tmp_path / "model", env=KINDS[kind][1](), device="cpu", weights_only=weights_only)
        for weights_only in (False, True, True)
    )
    objects = {"env", "policy", "replay_buffer", "_replay", "_logger", "_last_original_obs", "_last_episode_starts"}
    for name in vars(usual).keys() - objects:
        assert str(getattr(safe, name)) == str(getattr(usual, name)), name
    alone = type(model.policy).load(tmp_path / "policy.pth", device="cpu", weights_only=True)
    for policy in (safe.policy, alone):
        assert logits(policy).std() > 0
        assert th.equal(logits(policy), logits(model.policy))
    usual.load_replay_buffer(tmp_path / "buffer.pkl")
    safe.load_replay_buffer(tmp_path / "buffer.npz")
    mapped.load_replay_buffer(tmp_path / "buffer.npz", mmap=True)
    content = (tmp_path / "buffer.npz").read_bytes()
    cache = model.replay.cache
    assert cache is None or len(safe.replay.cache.state_dict()["sums"]) == len(cache.state_dict()["sums"]) > 0
    for each in (usual, safe, mapped):
        each.set_random_seed(1)
        each.learn(60, reset_num_timesteps=False)
        assert each.num_timesteps == 140
        assert th.equal(state(each), state(usual))
    assert not th.equal(state(usual), state(model))
    assert (tmp_path / "buffer.npz").read_bytes() == content


def test_code_is_named_and_can_be_passed(tmp_path):
    """All in one error; nothing of it is needed where it is given."""

    class Extractor(FlattenExtractor):
        pass

    kwargs = dict(net_arch=[8], features_extractor_class=Extractor)
    model = StaQ("MlpPolicy", "CartPole-v1", learning_rate=lambda x: 0.01 * x, policy_kwargs=kwargs, device="cpu")
    model.own, model.own_type = object(), np.dtype(np.float32)
    model.save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"model.zip has code for ") as error:
        StaQ.load(tmp_path / "model.zip", weights_only=True)
    for name in ("learning_rate (an object of builtins.function", "policy_kwargs (the class ", "own (an object of "):
        assert name in str(error.value)
    assert "own_type (an object of numpy" in str(error.value)
    own = dict(custom_objects=dict(policy_kwargs=kwargs, own=3, own_type=None), learning_rate=0.3)
    loaded = StaQ.load(tmp_path / "model.zip", weights_only=True, device="cpu", **own)
    assert (loaded.own, loaded.lr_schedule(1.0)) == (3, 0.3)
    assert th.equal(logits(loaded.policy), logits(model.policy))

    model.policy.save(tmp_path / "policy.pth")
    with pytest.raises(ValueError, match=r"policy.pth has code for features_extractor_class \(the class "):
        StaQPolicy.load(tmp_path / "policy.pth", weights_only=True)
    own = dict(features_extractor_class=Extractor)
    policy = StaQPolicy.load(tmp_path / "policy.pth", "cpu", custom_objects=own, weights_only=True)
    assert th.equal(logits(policy), logits(model.policy))
    assert type(StaQPolicy.load(tmp_path / "policy.pth").critics.net.features_extractor) is Extractor


@pytest.mark.parametrize("name", ["cartpole", "pendulum"])
def test_files_of_an_older_version(name):
    """They have pickles only: an error names what must be passed, with which a model loads."""
    with pytest.raises(ValueError, match=r"has code for .*observation_space.*train_freq"):
        StaQ.load(DATA / f"{name}_0.1.0.zip", weights_only=True)
    env = gym.make({"cartpole": "CartPole-v1", "pendulum": "Pendulum-v1"}[name])
    with zipfile.ZipFile(DATA / f"{name}_0.1.0.zip") as archive:
        data = json.loads(archive.read("data"))
    pickled = {key: None for key, value in data.items() if isinstance(value, dict) and ":serialized:" in value}
    own = dict(observation_space=env.observation_space, action_space=env.action_space, policy_class=StaQPolicy)
    own = {**pickled, **own, "train_freq": 4, "policy_kwargs": data["policy_kwargs"]}
    model = StaQ.load(DATA / f"{name}_0.1.0.zip", device="cpu", weights_only=True, custom_objects=own)
    expected = np.load(DATA / f"{name}_0.1.0_expected.npz")
    found = model.policy.frozen_critics.weights.scale * model.policy.logit_sums(th.as_tensor(expected["obs"]))
    th.testing.assert_close(found, th.as_tensor(expected["logits"]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="has its arguments as code only"):
        StaQPolicy.load(DATA / f"{name}_0.1.0.pth", weights_only=True)


VALUES = [
    spaces.Dict([("b", spaces.Discrete(3, start=-1)), ("a", spaces.Box(0, 255, (2, 3), np.uint8))]),
    spaces.Box(np.array([-np.inf, 0.1], np.float32), np.array([1.5, np.inf], np.float32)),
    spaces.Box(-1.0, 1.0, (2,), np.float64),
    spaces.Box(0, 1, (0,), np.float32),
    spaces.Box(-1, 1, (), np.float32),
    spaces.Box(-np.inf, np.inf, (), np.float64),
    spaces.Dict([("b", spaces.Dict(c=spaces.Box(0, 5, (), np.int32))), ("a", spaces.Box(-3, 2**62, (2,), np.int64))]),
    spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])),
    spaces.MultiDiscrete([2, 3], np.int32),
    spaces.MultiDiscrete([2, 3], start=[5, -1]),
    spaces.MultiBinary([2, 2]),
    np.float64(0.1),
    np.array([True, False]),
    [1, None, {"a": 0.1, "b": [-np.inf, "text"]}],
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_plain_values(value):
    found = from_json(json.loads(json.dumps(to_json(value))))
    assert type(found) is type(value)
    assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value
    if isinstance(value, spaces.Dict):
        assert list(found.spaces) == ["b", "a"]


def test_dictionaries_that_look_like_descriptions_are_refused():
    """Their keys begin with a colon; as plain values they would come back as something else."""
    with pytest.raises(ValueError, match=r"an object of builtins\.dict"):
        from_json(to_json({":tuple": [1, 2]}))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_boxes_of_older_files(shape):
    """They have no shape but that of the bounds."""
    low, high = ({":array": "<f4", "shape": list(shape), "values": value} for value in (-1.0, 2.0))
    entry = {":make": "gymnasium.spaces.box.Box", "low": low, "high": high, "dtype": "<f4"}
    assert from_json(entry) == spaces.Box(-1, 2, shape)


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "u1", "?", "<i8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_arrays_as_plain_values(dtype, shape):
    """Every bit of them, also of what is no number, in little more room than in memory."""
    rng = np.random.default_rng(0)
    for array in (
        np.zeros(shape, dtype),
        rng.integers(0, 2, shape).astype(dtype),
        rng.normal(size=shape).astype(dtype),
    ):
        if dtype == "<f8" and array.size > 1:
            array[:1] = np.nan
        found = from_json(json.loads(json.dumps(to_json(array))))
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    large = rng.normal(size=10_000)
    assert len(json.dumps(to_json(large))) < 1.4 * large.nbytes


def test_buffers_of_another_layout_are_refused(tmp_path):
    """With ``optimize_memory_usage``, timeouts are stored as real ends; the arrays alone do not tell."""
    no_timeouts = dict(replay_buffer_kwargs=dict(handle_timeout_termination=False))
    plain = make_model(RandomObsEnv()).learn(30)
    compact = make_model(RandomObsEnv(), optimize_memory_usage=True, **no_timeouts).learn(30)
    for model, other in ((plain, compact), (compact, plain)):
        model.save_replay_buffer(tmp_path / "buffer.npz")
        with pytest.raises(ValueError, match="Invalid replay buffer: its optimize_memory_usage is"):
            other.load_replay_buffer(tmp_path / "buffer.npz")


def test_scalar_actions(tmp_path):
    """Actions of shape () stay so; the training goes on with its buffer."""

    def make_env():
        return RandomObsEnv(action_space=spaces.Box(-1, 1, ()))

    model = make_model(make_env()).learn(30)
    model.save(tmp_path / "model.zip"), model.policy.save(tmp_path / "policy.pth")
    model.save_replay_buffer(tmp_path / "buffer.npz")
    loaded = StaQ.load(tmp_path / "model.zip", env=make_env(), device="cpu", weights_only=True)
    loaded.load_replay_buffer(tmp_path / "buffer.npz")
    policy = StaQPolicy.load(tmp_path / "policy.pth", "cpu", weights_only=True)
    obs = model.observation_space.sample()
    for each in (model, loaded, policy):
        assert each.predict(obs, deterministic=True)[0].shape == ()
    assert loaded.learn(10, reset_num_timesteps=False).num_timesteps == 40


@pytest.mark.filterwarnings("ignore:The last trajectory in the replay buffer will be truncated")
@pytest.mark.parametrize("truncate_last_traj", [True, False])
def test_unfinished_episodes_with_hindsight_experience_replay(truncate_last_traj, tmp_path):
    """They end where they are, or go on, as with a pickle."""

    def make():
        return make_model(BitFlippingEnv(20, max_steps=6), "MultiInputPolicy", **HER)

    model, buffers = make().learn(35), []
    for suffix in ("pkl", "npz"):
        model.save_replay_buffer(tmp_path / f"buffer.{suffix}")
        other = make()
        other.load_replay_buffer(tmp_path / f"buffer.{suffix}", truncate_last_traj)
        buffers.append(other.replay_buffer)
    for name in ("dones", "timeouts", "ep_start", "ep_length", "_current_ep_start"):
        np.testing.assert_array_equal(*(getattr(buffer, name) for buffer in buffers))
    assert (buffers[1]._current_ep_start == buffers[1].pos).all() == truncate_last_traj


def test_plain_schedules():
    for schedule, expected in (FloatSchedule(LinearSchedule(0.3, 0.1, 0.5)), 0.26), (SimpleLinearSchedule(0.1), 0.09):
        assert from_json(to_json(schedule))(0.9) == schedule(0.9) == pytest.approx(expected)


def test_what_is_left_out_is_nowhere_in_the_file(tmp_path):
    """The plain values are of what SB3 itself saves."""
    model = make_model(RandomObsEnv())
    model.own, model.secret = np.arange(5.0), np.array([123456789])
    for exclude in ["secret"], iter(["secret"]):
        model.save(tmp_path / "model.zip", exclude, include=["device"])
        with zipfile.ZipFile(tmp_path / "model.zip") as archive:
            text = archive.read("data").decode()
        data = json.loads(text)
        assert data["_plain"].keys() < data.keys() and {"own", "device"} <= data["_plain"].keys()
        assert "secret" not in text and "123456789" not in text
    given = dict(device=th.device("cpu"))
    loaded = StaQ.load(tmp_path / "model.zip", weights_only=True, custom_objects=given)
    assert loaded.own.tolist() == [0, 1, 2, 3, 4] and not hasattr(loaded, "secret")


def test_policy_of_the_package(tmp_path):
    """One that is no alias, as the RL Zoo makes it."""
    env = RandomObsEnv("image")
    model = make_model(env, MinAtarPolicy, policy_kwargs=dict(normalize_images=False)).learn(40)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy.pth")
    loaded = StaQ.load(tmp_path / "model", weights_only=True, device="cpu")
    alone = MinAtarPolicy.load(tmp_path / "policy.pth", weights_only=True, device="cpu")
    assert type(loaded.policy) is MinAtarPolicy
    assert th.equal(logits(loaded.policy), logits(model.policy)) and th.equal(logits(alone), logits(model.policy))


# Files from somebody who means harm


class Trap:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A folder with a file of each kind."""
    folder = tmp_path_factory.mktemp("honest")
    env = VecNormalize(make_vec_env(lambda: RandomObsEnv(action_space=BOX), 1))
    policy_kwargs = dict(activation_fn=th.nn.Tanh)
    model = make_model(env, critic="joint", logit_cache=True, policy_kwargs=policy_kwargs).learn(60)
    model.save(folder / "model.zip")
    model.policy.save(folder / "policy.pth")
    model.save_replay_buffer(folder / "buffer.npz")
    save_vec_normalize(folder / "normalize.npz", env)
    return folder


def load_all(path: Path, **kwargs):
    """All ways to load a file for which nothing of it may run."""
    ways = {
        "model": [
            lambda: StaQ.load(path, weights_only=True, device="cpu", **kwargs),
            lambda: StaQ.load(path, env=RandomObsEnv(action_space=BOX), weights_only=True).learn(5),
            lambda: make_model(RandomObsEnv(action_space=BOX), critic="joint").set_parameters(path),
        ],
        "policy": [lambda: StaQPolicy.load(path, device="cpu", weights_only=True, **kwargs)],
        "buffer": [
            lambda: make_model(RandomObsEnv(action_space=BOX), critic="joint").load_replay_buffer(path),
            lambda: make_model(RandomObsEnv(action_space=BOX), critic="joint").load_replay_buffer(path, mmap=True),
        ],
        "normalize": [lambda: load_vec_normalize(path, DummyVecEnv([RandomObsEnv]))],
    }
    refused = []
    for load in ways[path.stem]:
        try:
            load()
            refused.append(None)
        except Exception as error:
            refused.append(error)
    return refused


def poisoned_arrays(trap) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([trap], dtype=object))
    return file.getvalue()


def poisoned_tensors(trap) -> bytes:
    file = io.BytesIO()
    th.save({"x": trap}, file)
    return file.getvalue()


@pytest.mark.parametrize("name", ["model.zip", "policy.pth", "buffer.npz", "normalize.npz"])
def test_nothing_in_any_member_is_run(name, honest, tmp_path):
    """Each member in turn is replaced by a trap in all the forms in which its reader might unpickle it."""
    assert not any(load_all(honest / name))
    trap, path, n_refused = Trap(tmp_path / "marker"), tmp_path / name, 0
    with zipfile.ZipFile(honest / name) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    for member in [*members, "more.pth", "more.npy", "pytorch_variables.pth"]:
        for content in (pickle.dumps(trap), poisoned_tensors(trap), poisoned_arrays(trap)):
            with zipfile.ZipFile(path, "w") as archive:
                for each, old in {**members, member: content}.items():
                    archive.writestr(each, content if each == member else old)
            n_refused += any(load_all(path))
            assert not (tmp_path / "marker").exists(), member
    assert n_refused >= len(members)


def rewrite_data(old: Path, new: Path, **changes):
    with zipfile.ZipFile(old) as archive, zipfile.ZipFile(new, "w") as changed:
        for member in archive.namelist():
            content = archive.read(member)
            if member == "data":
                content = json.dumps({**json.loads(content), **changes}).encode()
            changed.writestr(member, content)


def test_nothing_in_any_argument_is_run(honest, tmp_path):
    """A trap as each of the arguments and counters, and as one that there is not."""
    with zipfile.ZipFile(honest / "model.zip") as archive:
        names = json.loads(archive.read("data")).keys()
    trap = {":serialized:": base64.b64encode(pickle.dumps(Trap(tmp_path / "marker"))).decode()}
    n_refused = 0
    for name in [*names, "another"]:
        rewrite_data(honest / "model.zip", tmp_path / "model.zip", **{name: trap})
        try:
            StaQ.load(tmp_path / "model.zip", device="cpu", weights_only=True)
        except Exception:
            n_refused += 1
        assert not (tmp_path / "marker").exists(), name
    assert n_refused > len(names) / 2
    StaQ.load(tmp_path / "model.zip", device="cpu")
    assert (tmp_path / "marker").exists()  # the trap is one


def test_nothing_is_run_in_a_replaced_policy(honest, tmp_path):
    """A file of SB3's own format, which has pickles."""
    (tmp_path / "policy.pth").write_bytes(poisoned_tensors(Trap(tmp_path / "marker")))
    assert all(load_all(tmp_path / "policy.pth"))
    assert not (tmp_path / "marker").exists()


CLASSES = [{":class": "subprocess.Popen"}, {":make": "Popen", "args": "ls"}, {":make": "Box"}, {":array": "O"}]


@pytest.mark.parametrize("item", CLASSES)
def test_no_class_but_the_known_ones(item, honest, tmp_path):
    with zipfile.ZipFile(honest / "model.zip") as archive:
        plain = json.loads(archive.read("data"))["_plain"]
    rewrite_data(honest / "model.zip", tmp_path / "model.zip", _plain={**plain, "policy_class": item})
    with pytest.raises(ValueError, match=r"has code for policy_class \("):
        StaQ.load(tmp_path / "model.zip", weights_only=True, device="cpu")


def test_no_environment_and_no_folder_of_the_file(honest, tmp_path, monkeypatch):
    """Gymnasium imports what stands before a colon; logs would be written where the file says."""
    (tmp_path / "module_of_the_file.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    rewrite_data(honest / "model.zip", tmp_path / "model.zip", env="module_of_the_file:X-v0", tensorboard_log="/logs")
    loaded = StaQ.load(tmp_path / "model.zip", weights_only=True, device="cpu")
    assert loaded.env is None and loaded.tensorboard_log is None
    assert th.equal(logits(loaded.policy), logits(StaQ.load(honest / "model.zip", device="cpu").policy))


# Arrays


def test_buffer_of_another_model(tmp_path):
    """The model keeps its own."""
    model = trained()
    model.save_replay_buffer(tmp_path / "buffer.npz")
    for other, message in [
        (make_model(RandomObsEnv("dict"), "MultiInputPolicy"), "its observation_space is"),
        (make_model(RandomObsEnv(n_actions=4)), "its action_space is"),
        (make_model(RandomObsEnv(), buffer_size=100), r"observations have shape \(300, 1, 4\)"),
        (make_model(DummyVecEnv([RandomObsEnv] * 2)), "have shape"),
    ]:
        own = other.replay_buffer
        with pytest.raises(ValueError, match=message):
            other.load_replay_buffer(tmp_path / "buffer.npz")
        assert other.replay_buffer is own
    (tmp_path / "other.npz").write_bytes((DATA / "cartpole_0.1.0_expected.npz").read_bytes())
    with pytest.raises(ValueError, match="is damaged, or not of sb3_staq"):
        model.load_replay_buffer(tmp_path / "other.npz")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    with pytest.raises(ValueError, match="Invalid mmap=True"):
        model.load_replay_buffer(tmp_path / "buffer.pkl", mmap=True)


def test_buffer_with_objects(tmp_path):
    kwargs = dict(replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(copy_info_dict=True))
    model = make_model(BitFlippingEnv(4), "MultiInputPolicy", **kwargs).learn(30)
    with pytest.raises(ValueError, match="its infos are objects"):
        model.save_replay_buffer(tmp_path / "buffer.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["box", "dict", "rewards only", "switched off"])
def test_statistics_of_vec_normalize(kind, tmp_path):
    def make_env():
        return make_vec_env(lambda: RandomObsEnv("dict" if kind == "dict" else "box"), 2, seed=3)

    own = dict(norm_obs_keys=["a"]) if kind == "dict" else dict(norm_obs=kind != "rewards only")
    env = VecNormalize(make_env(), gamma=0.9, clip_obs=1.5, clip_reward=0.7, epsilon=0.3, **own)
    env.reset()
    for _ in range(20):
        env.step(np.array([0, 2]))
    env.training, env.norm_obs, env.norm_reward = False, env.norm_obs and kind != "switched off", False
    save_vec_normalize(tmp_path / "statistics", env)
    loaded = load_vec_normalize(tmp_path / "statistics", make_env())
    arguments = ("training", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys")
    for name in arguments:
        assert getattr(loaded, name) == getattr(env, name), name
    obs, rewards = env.get_original_obs(), np.array([0.3, -0.2])
    for each in (env, loaded):
        each.norm_obs, each.norm_reward = kind != "rewards only", True
    np.testing.assert_equal(loaded.normalize_obs(obs), env.normalize_obs(obs))
    np.testing.assert_equal(loaded.normalize_reward(rewards), env.normalize_reward(rewards))
    if kind == "box":
        with pytest.raises(ValueError, match="no statistics for these environments"):
            load_vec_normalize(tmp_path / "statistics", make_vec_env("Pendulum-v1"))


# Damage


@pytest.mark.parametrize("name", ["model.zip", "policy.pth", "buffer.npz", "normalize.npz"])
def test_damage_is_noticed(name, honest, tmp_path):
    """In any member, or in the directory of the zip, where some of it would hide members."""
    content = (honest / name).read_bytes()
    places = []
    with zipfile.ZipFile(honest / name) as archive:
        for member in archive.infolist():
            lengths = struct.unpack("<HH", content[member.header_offset + 26 : member.header_offset + 30])
            places.append(member.header_offset + 30 + sum(lengths) + member.file_size // 2)
    is_folder = content.rfind(b"PK\1\2") + 38
    number_of_members = len(content) - 12
    for place in [*places, is_folder, number_of_members]:
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        (tmp_path / name).write_bytes(damaged)
        assert all("is damaged" in str(error) for error in load_all(tmp_path / name)[:2]), place
    (tmp_path / name).write_bytes(content[:-100])
    assert "is damaged" in str(load_all(tmp_path / name)[0])
