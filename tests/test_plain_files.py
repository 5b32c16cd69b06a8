"""Files without pickles: what comes back is what was saved, and nothing of a hostile file is executed."""

import base64
import io
import json
import os
import zipfile
from collections import OrderedDict, deque

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.her import GoalSelectionStrategy, HerReplayBuffer
from stable_baselines3.sac.policies import SACPolicy

from sb3_staq.buffer_files import check_buffer, load_arrays, load_buffer, load_normalization, save_buffer

from sb3_staq.buffer_files import save_arrays, save_normalization  # isort: skip
from sb3_staq.plain_json import add_arguments, from_json, load_policy, save_policy, to_json, without_pickles
from sb3_staq.save_util import open_archive

BOX = spaces.Box(-1, 1, (3,), np.float32)


def through_json(value, **kwargs):
    return from_json(json.loads(json.dumps({"x": to_json(value)})), **kwargs)["x"]


# JSON

BOUNDS = np.array([-0.1, np.pi, -np.inf], np.float32)
SPACES = [
    BOX,
    spaces.Box(BOUNDS, BOUNDS + np.float32(1 / 3), dtype=np.float32),
    spaces.Box(np.array([0.1, -1e300]), np.array([np.nextafter(1, 2), np.inf]), dtype=np.float64),
    spaces.Box(0, 255, (36, 36, 1), np.uint8),
    spaces.Box(np.float32(-2), np.float32(3), (), np.float32),
    spaces.Box(-0.0, 0.0, (2,), np.float32),
    spaces.Discrete(5),
    spaces.Discrete(5, start=-2),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiDiscrete(np.array([[2, 3], [4, 5]]), start=np.array([[1, 0], [-1, 2]])),
    spaces.MultiBinary(4),
    spaces.MultiBinary([2, 3]),
    spaces.Tuple([BOX, spaces.Discrete(2)]),
    spaces.Dict(OrderedDict(z=BOX, a=spaces.Dict(b=spaces.Discrete(3)))),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces(space):
    restored = through_json(space)
    assert restored == space  # approximately, for the bounds of a Box
    assert repr(restored) == repr(space)
    assert restored.shape == space.shape
    assert restored.dtype == space.dtype
    if isinstance(space, spaces.Box):
        assert restored.low.tobytes() == space.low.tobytes()
        assert restored.high.tobytes() == space.high.tobytes()
    if isinstance(space, spaces.Dict):
        assert list(restored.spaces) == list(space.spaces)
    assert space.contains(restored.sample())


def test_a_large_box_takes_little_room():
    assert len(json.dumps(to_json(spaces.Box(0, 255, (84, 84, 4), np.uint8)))) < 500


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, 2**70, 0.1, float("inf"), "text", [1, [2.5, None]], (1, ("a",)), {"a": {"b": (1,)}}, []),
        *(th.nn.Tanh, th.optim.SGD, NatureCNN, HerReplayBuffer, np.dtype(np.int16)),
        *(TrainFreq(4, TrainFrequencyUnit.EPISODE), GoalSelectionStrategy.FINAL),
        *(deque([{"r": 1.5, "l": 3}], maxlen=7), deque()),
    ],
    ids=str,
)
def test_values(value):
    restored = through_json(value)
    assert restored == value
    assert type(restored) is type(value)
    if isinstance(value, deque):
        assert restored.maxlen == value.maxlen


@pytest.mark.parametrize("dtype", ["?", "i1", "u8", "<i4", ">f4", "f2", "f8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3)])
def test_arrays_in_json(dtype, shape):
    rng = np.random.default_rng(0)
    for array in (np.zeros(shape, dtype), rng.integers(0, 2**60, shape).astype(dtype)):
        restored = through_json(array)
        assert restored.shape == array.shape
        assert restored.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")  # numbers have the machine's order
        assert np.asarray(restored, dtype).tobytes() == array.tobytes()


def test_schedules():
    for schedule in (
        ConstantSchedule(0.3),
        LinearSchedule(0.5, 0.1, 0.7),
        FloatSchedule(LinearSchedule(0.5, 0.1, 0.7)),
        FloatSchedule(2),
    ):
        restored = through_json(schedule)
        assert type(restored) is type(schedule)
        assert [restored(x) for x in (1.0, 0.6, 0.0)] == [schedule(x) for x in (1.0, 0.6, 0.0)]


class OwnExtractor(NatureCNN):
    pass


class OwnBox(spaces.Box):
    pass


def test_what_cannot_be_restored_is_named_at_once():
    items = dict(
        learning_rate=lambda _: 0.1,
        policy_kwargs=dict(net_arch=[3], features_extractor_class=OwnExtractor),
        schedule=FloatSchedule(lambda _: 0.1),
        space=OwnBox(-1, 1, (2,)),
        good=1,
    )
    plain = json.loads(json.dumps({name: to_json(value) for name, value in items.items()}))
    with pytest.raises(ValueError, match=r"Invalid a\.zip: .*code for learning_rate \(a .*function\)") as error:
        from_json(plain, {}, file="a.zip")
    assert "policy_kwargs (the class test_plain_files.OwnExtractor)" in str(error.value)
    assert "schedule" in str(error.value) and "space (a test_plain_files.OwnBox)" in str(error.value)
    assert "good" not in str(error.value)
    given = {name: items[name] for name in ("learning_rate", "schedule", "space")}
    restored = from_json(plain, given, [OwnExtractor])
    assert restored == items


@pytest.mark.parametrize(
    "item",
    [
        {":class": "os.system"},
        {":class": "builtins.eval"},
        {":make": "system", "command": "true"},
        {":make": "Popen"},
        {":array": "O", "shape": [1], "values": [1]},
        {":dtype": "O"},
        {":array": "<f4", "shape": [5], "values": [1, 2]},
        {":make": "Box", "low": "x"},
    ],
    ids=str,
)
def test_hostile_json(item):
    with pytest.raises(ValueError, match=r"a\.zip"):
        from_json({"x": item}, {}, file="a.zip")


# Models and policies


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def hostile_pth(marker):
    file = io.BytesIO()
    th.save({"x": Hostile(marker)}, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def saved_model():
    """A model of SB3 with plain arguments added, as bytes, and its actor's parameters."""
    model = SAC("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", gamma=0.9, policy_kwargs=dict(net_arch=[3]))
    archive = io.BytesIO()
    model.save(archive)
    left_out = {
        *model._excluded_save_params(),
        "actor",
        "critic",
        "critic_target",
        "log_ent_coef",
        "ent_coef_optimizer",
    }
    add_arguments(archive, {name: value for name, value in vars(model).items() if name not in left_out})
    return archive.getvalue(), [param.detach().clone() for param in model.policy.parameters()]


def load_safely(path, **kwargs):
    with open_archive(path) as file:
        reduced, custom_objects = without_pickles(file, kwargs, [SACPolicy])
    return SAC.load(reduced, env=gym.make("Pendulum-v1"), device="cpu", custom_objects=custom_objects)


def test_a_model_without_pickles(saved_model, tmp_path):
    """Its pickles are gone, and what SB3 loads is the whole model."""
    (tmp_path / "model.zip").write_bytes(saved_model[0])
    loaded = load_safely(tmp_path / "model.zip", tau=0.5)
    assert all(th.equal(a, b) for a, b in zip(loaded.policy.parameters(), saved_model[1], strict=True))
    assert (loaded.gamma, loaded.tau, loaded.policy_kwargs["net_arch"]) == (0.9, 0.5, [3])
    loaded.learn(110)
    with open_archive(tmp_path / "model.zip") as file:
        reduced, _ = without_pickles(file, {}, [SACPolicy])
    assert b":serialized:" not in reduced.getvalue()
    with open_archive(tmp_path / "model.zip") as file, pytest.raises(ValueError, match=r"policy_class \(the class"):
        without_pickles(file, {})


def test_a_hostile_pickle_in_each_member(saved_model, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "model.zip"
    pickled = {":type:": "x", ":serialized:": base64.b64encode(cloudpickle.dumps(Hostile(marker))).decode()}
    with zipfile.ZipFile(io.BytesIO(saved_model[0])) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for key in ["anything", *json.loads(members["data"])]:
        path.unlink(missing_ok=True)
        data = {**json.loads(members["data"]), key: pickled}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, json.dumps(data) if name == "data" else content)
        if key == "anything":  # the file is dangerous, and harmless if its pickles are ignored
            SAC.load(path, device="cpu")
            assert marker.exists()
            marker.unlink()
        loaded = load_safely(path)
        assert all(th.equal(a, b) for a, b in zip(loaded.policy.parameters(), saved_model[1], strict=True))
    for hostile in [*members, "more.pth"]:
        for content in (hostile_pth(marker), cloudpickle.dumps(Hostile(marker)), json.dumps({"x": pickled}).encode()):
            with zipfile.ZipFile(path, "w") as archive:
                for name in {**members, hostile: b""}:
                    archive.writestr(name, content if name == hostile else members[name])
            try:
                load_safely(path)
            except Exception:
                pass  # refused
            assert not marker.exists(), hostile


def test_policy_files(tmp_path):
    state = {"weight": th.arange(3.0), "extra": {"slots": [1, 2]}}
    arguments = dict(space=BOX, activation_fn=th.nn.Tanh, extractor=OwnExtractor, net_arch=[4])
    path = tmp_path / "policy.pth"
    save_policy(path, state, arguments)
    for kwargs in (
        {},
        dict(weights_only=True, given=dict(extractor=OwnExtractor)),
        dict(weights_only=True, classes=[OwnExtractor]),
    ):
        loaded_state, loaded_arguments = load_policy(path, "cpu", **kwargs)
        assert th.equal(loaded_state["weight"], state["weight"])
        assert loaded_state["extra"] == state["extra"]
        assert loaded_arguments == arguments
    assert load_policy(path, "cpu", given=dict(net_arch=[5]))[1]["net_arch"] == [5]
    with pytest.raises(
        ValueError, match=r"policy.pth: .*code for extractor \(the class test_plain_files.OwnExtractor\)"
    ):
        load_policy(path, "cpu", weights_only=True)
    th.save({"state_dict": state, "data": arguments}, path)  # as SB3 does
    assert load_policy(path, "cpu")[1] == arguments
    with pytest.raises(ValueError, match=r"policy.pth has its arguments only as code"):
        load_policy(path, "cpu", weights_only=True)


def test_hostile_policy_files(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "policy.pth"
    save_policy(path, {"weight": th.ones(2)}, dict(a=Hostile(marker), b=1))
    load_policy(path, "cpu")
    assert marker.exists()
    marker.unlink()
    assert load_policy(path, "cpu", weights_only=True, given=dict(a=2))[1] == dict(a=2, b=1)
    good = dict(state_dict={}, arguments="{}", pickled_arguments=th.zeros(1))
    for key in good:
        th.save({**good, key: Hostile(marker)}, path)
        with pytest.raises(ValueError, match=r"policy.pth"):
            load_policy(path, "cpu", weights_only=True)
    assert not marker.exists()


# Replay buffers


def make_buffer(kind, n_envs=2, n=30, size=40, **kwargs):
    """A buffer with n random transitions per environment."""
    rng = np.random.default_rng(n)
    dict_space = spaces.Dict(dict.fromkeys(["observation", "achieved_goal", "desired_goal"], BOX))
    cls, space, kwargs = {
        "plain": (ReplayBuffer, BOX, {}),
        "optimized": (ReplayBuffer, BOX, dict(optimize_memory_usage=True, handle_timeout_termination=False)),
        "dict": (DictReplayBuffer, spaces.Dict({"a/b": BOX, "c": spaces.Discrete(4)}), {}),
        "n_step": (NStepReplayBuffer, BOX, dict(n_steps=4, gamma=0.7)),
        "her": (HerReplayBuffer, dict_space, dict(env=None, goal_selection_strategy="final", n_sampled_goal=3)),
    }[kind]
    buffer = cls(size, space, spaces.Discrete(5), device="cpu", n_envs=n_envs, **{**kwargs})

    def observe():
        def draw(space):
            return rng.integers(4, size=n_envs) if isinstance(space, spaces.Discrete) else rng.random((n_envs, 3))

        return {key: draw(sub) for key, sub in space.spaces.items()} if isinstance(space, spaces.Dict) else draw(space)

    for i in range(n):
        done = np.array([i % 5 == 4] * n_envs)
        infos = [{"TimeLimit.truncated": bool(i % 10 == 9)}] * n_envs
        buffer.add(observe(), observe(), rng.integers(5, size=n_envs), rng.random(n_envs), done, infos)
    return buffer


class Goals:
    """What HER asks of its environment."""

    def env_method(self, name, achieved, desired, infos, indices):
        return [np.linalg.norm(achieved - desired, axis=-1)]


def sample(buffer):
    if isinstance(buffer, HerReplayBuffer):
        buffer.env = Goals()
    np.random.seed(1)
    fields = buffer.sample(50)
    return [x for field in fields for x in (field.values() if isinstance(field, dict) else [field]) if x is not None]


@pytest.mark.parametrize("how", ["npz", "mmap", "pkl"])
@pytest.mark.parametrize("n", [13, 30, 57])
@pytest.mark.parametrize("kind", ["plain", "optimized", "dict", "n_step", "her"])
def test_round_trip_of_a_buffer(kind, n, how, tmp_path):
    """The same samples, also after more transitions; the file stays as it is."""
    buffer, path = make_buffer(kind, n=n), tmp_path / f"buffer.{'pkl' if how == 'pkl' else 'npz'}"
    extra = {"logits": np.random.default_rng(0).random((20, 2, 5), np.float32), "b/c": np.arange(3)}
    save_buffer(path, buffer, extra)
    data = path.read_bytes()
    loaded, loaded_extra = load_buffer(path, mmap=how == "mmap")
    assert type(loaded) is type(buffer)
    assert loaded_extra.keys() == extra.keys()
    assert all(np.array_equal(loaded_extra[key], extra[key]) for key in extra)
    assert vars(loaded).keys() == vars(buffer).keys()
    for more in (0, 15):
        for each in (buffer, loaded):
            other = make_buffer(kind, n=1)
            for _ in range(more):
                obs = other.observations if isinstance(other.observations, dict) else {"": other.observations}
                obs = {key: array[0] for key, array in obs.items()}
                obs = obs if isinstance(other.observations, dict) else obs[""]
                each.add(obs, obs, other.actions[0], np.ones(2), np.ones(2), [{}, {}])
        for actual, expected in zip(sample(loaded), sample(buffer), strict=True):
            assert th.equal(actual, expected)
    assert path.read_bytes() == data


def test_mapped_arrays_are_aligned_and_in_the_file(tmp_path):
    buffer = make_buffer("dict")
    save_buffer(tmp_path / "buffer.npz", buffer)
    for value in vars(load_buffer(tmp_path / "buffer.npz", mmap=True)[0]).values():
        for array in value.values() if isinstance(value, dict) else [value]:
            if isinstance(array, np.ndarray):
                assert array.ctypes.data % 64 == 0
                assert isinstance(array.base, np.memmap)


def test_numpy_reads_the_arrays(tmp_path):
    buffer = make_buffer("dict")
    save_buffer(tmp_path / "buffer.npz", buffer)
    with np.load(tmp_path / "buffer.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["rewards"], buffer.rewards)
        assert np.array_equal(arrays["observations/a/b"], buffer.observations["a/b"])


def test_pickles_of_and_for_sb3(tmp_path):
    buffer = make_buffer("plain")
    save_buffer(tmp_path / "ours", buffer, {"logits": np.ones(3)})
    assert np.array_equal(load_from_pkl(tmp_path / "ours").rewards, buffer.rewards)
    save_to_pkl(tmp_path / "theirs.pkl", buffer)
    loaded, extra = load_buffer(tmp_path / "theirs")
    assert np.array_equal(loaded.rewards, buffer.rewards)
    assert extra == {}
    save_to_pkl(tmp_path / "other.pkl", [1])
    with pytest.raises(ValueError, match=r"Invalid replay buffer: expected a ReplayBuffer in .*other.pkl, got list"):
        load_buffer(tmp_path / "other.pkl")


class OwnBuffer(ReplayBuffer):
    pass


def test_buffers_that_are_not_all_arrays(tmp_path):
    her = make_buffer("her")
    her.copy_info_dict = True
    with pytest.raises(ValueError, match=r"Invalid copy_info_dict=True: expected False for .*b.npz"):
        save_buffer(tmp_path / "b.npz", her)
    with pytest.raises(ValueError, match=r"Invalid replay buffer: expected ReplayBuffer, .*b.npz, got OwnBuffer"):
        save_buffer(tmp_path / "b.npz", OwnBuffer(5, BOX, BOX))
    with pytest.raises(ValueError, match=r"code for observation_space \(a test_plain_files.OwnBox\)"):
        save_buffer(tmp_path / "b.npz", ReplayBuffer(5, OwnBox(-1, 1, (2,)), BOX))
    assert os.listdir(tmp_path) == []


def test_hostile_arrays(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "buffer.npz"
    save_buffer(path, make_buffer("plain"))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    objects = io.BytesIO()
    np.save(objects, np.array([Hostile(marker)]), allow_pickle=True)
    pointers = io.BytesIO()
    np.lib.format.write_array_header_1_0(pointers, dict(descr="|O", fortran_order=False, shape=(20, 2)))
    header = json.loads(members["header.json"])
    contents = [objects.getvalue(), pointers.getvalue() + bytes(320), cloudpickle.dumps(Hostile(marker))]
    contents += [json.dumps({**header, "class": {":class": "os.system"}}).encode(), b"[1]", b""]
    for name in members:
        for content in contents:
            with zipfile.ZipFile(path, "w") as archive:
                for other in members:
                    archive.writestr(other, content if other == name else members[other])
            for mmap in (False, True):
                with pytest.raises(ValueError, match=r"buffer\.npz"):
                    load_buffer(path, mmap)
                with pytest.raises(ValueError, match=r"buffer\.npz"):
                    load_normalization(path, DummyVecEnv([lambda: gym.make("CartPole-v1")]))
    assert not marker.exists()


def test_damaged_arrays(tmp_path):
    path = tmp_path / "buffer.npz"
    save_buffer(path, make_buffer("plain"), {"logits": np.arange(4)})
    data = path.read_bytes()
    expected = {key: array.tobytes() for key, array in load_arrays(path, "replay buffer")[1].items()}
    for bit in range(0, 8 * len(data), 53):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(changed)
        for mmap in (False, True):
            try:
                arrays = load_arrays(path, "replay buffer", mmap)[1]
            except ValueError as error:
                assert "buffer.npz is damaged: " in str(error)
            else:
                assert {key: array.tobytes() for key, array in arrays.items()} == expected
    with pytest.raises(ValueError, match=r"expected a replay buffer, got 'normalization'"):
        save_arrays(path, "normalization", {}, {})
        load_buffer(path)


OTHERS = [
    (dict(action_space=spaces.Discrete(7)), "action_space is Discrete"),
    (dict(action_space=spaces.Box(-1, 1, (1,), np.float32)), "action_space is Box"),
    (dict(action_space=spaces.Discrete(2, start=1)), "action_space is Discrete"),
    (dict(observation_space=spaces.Box(-1, 1, (4,), np.float32)), "observation_space is Box"),
    (dict(observation_space=spaces.Box(0, 255, (3,), np.uint8)), "observation_space is Box"),
    (dict(observation_space=spaces.Discrete(3)), "observation_space is Discrete"),
    (dict(n_envs=2), "n_envs is 2, expected 1"),
]


@pytest.mark.parametrize("other, message", OTHERS)
def test_buffers_of_other_environments(other, message):
    right = dict(buffer_size=10, observation_space=BOX, action_space=spaces.Discrete(2), n_envs=1)
    own = ReplayBuffer(**right)
    with pytest.raises(ValueError, match=f"Invalid replay buffer: {message}"):
        check_buffer(ReplayBuffer(**{**right, **other}), own)
    check_buffer(ReplayBuffer(**{**right, "buffer_size": 3}), own)
    check_buffer(ReplayBuffer(**{**right, "observation_space": spaces.Box(-9, 9, (3,), np.float64)}), own)


# Statistics of VecNormalize


class Env(gym.Env):
    action_space = spaces.Discrete(2)

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(self.np_random.random()), False, False, {}


def make_venv(space):
    return DummyVecEnv([lambda: Env(space)] * 2)


@pytest.mark.parametrize("kind", ["box", "dict", "keys", "rewards", "switched off", "image"])
def test_round_trip_of_normalization(kind, tmp_path):
    space = {
        "dict": spaces.Dict(a=BOX, b=BOX),
        "keys": spaces.Dict(a=BOX, b=spaces.Discrete(3)),
        "image": spaces.Box(0, 255, (36, 36, 1), np.uint8),
    }.get(kind, BOX)
    kwargs = {"keys": dict(norm_obs_keys=["a"]), "rewards": dict(norm_obs=False)}.get(kind, {})
    env = VecNormalize(make_venv(space), clip_obs=3.0, gamma=0.9, **kwargs)
    env.reset()
    for _ in range(20):
        env.step(np.zeros(2, int))
    if kind == "switched off":
        env.training = env.norm_obs = False
    save_normalization(tmp_path / "normalization", env)
    loaded = load_normalization(tmp_path / "normalization.npz", make_venv(space))
    assert (loaded.training, loaded.norm_obs, loaded.clip_obs, loaded.gamma) == (
        env.training,
        env.norm_obs,
        3.0,
        0.9,
    )
    for _ in range(2):
        obs = (
            {key: sub.sample() for key, sub in space.spaces.items()}
            if isinstance(space, spaces.Dict)
            else space.sample()
        )
        actual, expected = loaded.normalize_obs(obs), env.normalize_obs(obs)
        for key in obs if isinstance(obs, dict) else [...]:
            assert np.array_equal(actual[key], expected[key])
        assert loaded.normalize_reward(np.array([0.3])) == env.normalize_reward(np.array([0.3]))
        if kind == "switched off":
            env.norm_obs = loaded.norm_obs = True
    if kind != "rewards":
        rms = env.obs_rms["a"] if isinstance(space, spaces.Dict) else env.obs_rms
        assert rms.count > 20  # there was something to restore
    loaded.reset()
    loaded.step(np.zeros(2, int))
    with pytest.raises(ValueError, match=r"Invalid normalization: observation_space is "):
        load_normalization(tmp_path / "normalization.npz", make_venv(spaces.Box(-1, 1, (9,))))
