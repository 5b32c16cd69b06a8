"""Exported policies against `predict` and brute force, in other processes, and what a failure leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomObsEnv, grow, make_model, randomise, slow_average, slow_log_policy, slow_logit_sums
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_staq import StaQ, export
from sb3_staq.array_files import save_vec_normalize
from sb3_staq.export import export_policy

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

METADATA = ("branch_sizes", "bins", "inputs")
ACTION_SPACES = [
    spaces.Discrete(3, start=2),
    spaces.MultiDiscrete([[2, 3], [4, 2]]),
    spaces.MultiBinary(3),
    spaces.Box(np.float32([-2, 0]), np.float32([3, 0])),
]


def make_normalised(kind="dict", policy="MultiInputPolicy", action_space=None, **kwargs):
    """A model whose observations are normalised by statistics that are not trivial, with different critics."""
    env = VecNormalize(DummyVecEnv([lambda: RandomObsEnv(kind, action_space=action_space)]), **kwargs)
    model = make_model(env, policy, eval_policy="average")
    grow(model, 5)
    rms = env.obs_rms["a"] if kind == "dict" else env.obs_rms
    rms.mean, rms.var = np.linspace(-1, 5, len(rms.mean)), np.linspace(0.1, 9, len(rms.mean))
    return model


def draw(space, n, seed=1):
    """A batch of observations as an environment gives them, one array for each key."""
    space.seed(seed)
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in space.spaces}
    return np.stack([np.asarray(sample) for sample in samples])


def run_script(path, obs):
    """What a TorchScript file gives, as arrays."""
    inputs = [th.as_tensor(x) for x in (obs.values() if isinstance(obs, dict) else [obs])]
    return [x.numpy() for x in th.jit.load(path)(*inputs)]


def slow_prob(policy, obs):
    """Probabilities of the bins of the delivered policy, one ordinary network after the other."""
    weights, obs = policy.frozen_critics.weights, policy.obs_to_tensor(obs)[0]
    average = policy.eval_policy == "average"
    sums = weights.total * slow_average(policy, obs) if average else slow_logit_sums(policy, obs)
    return slow_log_policy(policy, weights.scale * sums).exp().numpy()


@pytest.mark.parametrize("action_space", ACTION_SPACES, ids=str)
@pytest.mark.parametrize(("kind", "policy"), [("box", "MlpPolicy"), ("dict", "MultiInputPolicy")])
def test_all_action_spaces(kind, policy, action_space, tmp_path):
    """Actions as `predict` gives them, for any batch size; probabilities by brute force; the bins that they are of."""
    model = make_model(RandomObsEnv(kind, action_space=action_space), policy, eval_policy="average")
    grow(model, 5)
    path = export_policy(model, tmp_path / "policy.pt")
    for n in (1, 5):
        obs = draw(model.observation_space, n)
        actions, _, prob = run_script(path, obs)
        np.testing.assert_allclose(actions, model.predict(obs, deterministic=True)[0], atol=1e-5)
        np.testing.assert_allclose(prob, slow_prob(model.policy, obs), atol=1e-5)

    extra = dict.fromkeys(METADATA, "")
    th.jit.load(path, _extra_files=extra)
    assert json.loads(extra["inputs"]) == {"box": ["obs"], "dict": ["a", "b"]}[kind]
    bins = json.loads(extra["bins"])
    assert [len(branch) for branch in bins] == json.loads(extra["branch_sizes"]) == list(model.policy.branches.sizes)
    for choose in (min, max):  # the first and the last bin of each branch make the lowest and the highest action
        action = np.reshape([choose(branch) for branch in bins], action_space.shape).astype(action_space.dtype)
        assert action_space.contains(action if action_space.shape else action_space.dtype.type(action))
    if isinstance(action_space, spaces.Box):
        np.testing.assert_allclose(bins, np.linspace(action_space.low, action_space.high, 5).T, atol=1e-6)

    # Sampled actions have these probabilities
    one = {key: x[:1] for key, x in obs.items()} if isinstance(obs, dict) else obs[:1]
    many = {key: x.repeat(4000, 0) for key, x in one.items()} if isinstance(one, dict) else one.repeat(4000, 0)
    sampled = run_script(path, many)[1]
    assert sampled.shape == (4000, *action_space.shape)
    sampled = sampled.reshape(4000, -1)
    prob, column = slow_prob(model.policy, one)[0], 0
    for d, branch in enumerate(bins):
        for value in dict.fromkeys(branch):  # a Box whose bounds are equal has one value, several times
            same = [p for x, p in zip(branch, prob[column : column + len(branch)], strict=True) if x == value]
            assert np.isclose(sampled[:, d], value, atol=1e-5).mean() == pytest.approx(sum(same), abs=0.04)
        column += len(branch)


@pytest.mark.parametrize(
    "grid",
    [dict(action_bins=2), dict(action_bins=4), dict(action_grid="joint", action_bins=4), dict(action_grid="axis")],
)
def test_bounds_of_actions(grid, tmp_path):
    """Also where they are equal, and between single-precision numbers."""
    space = spaces.Box(np.array([-0.1, 0.3, -7, -0.3]), np.array([0.7, 0.3, 9, 0.1]), dtype=np.float64)
    assert -0.3 + (0.1 - -0.3) > 0.1  # rounding leads out of it
    model = make_model(RandomObsEnv(action_space=space), **grid)
    grow(model, 3, ent_coef=1.0)
    obs = draw(model.observation_space, 50)
    path = export_policy(model, tmp_path / "policy.pt")
    for actions in run_script(path, obs)[:2]:
        assert all(space.contains(action) for action in actions)


@pytest.mark.parametrize("action_grid", ["axis", "joint"])
@pytest.mark.parametrize(("kind", "policy"), [("discrete", "MlpPolicy"), ("image", "CnnPolicy")])
def test_whole_actions_as_bins(kind, policy, action_grid, tmp_path):
    """The bins of one branch are vectors; the action is the most probable one."""
    env = RandomObsEnv(kind, action_space=spaces.Box(-2, 3, (2,)))
    model = make_model(env, policy, action_grid=action_grid, action_bins=3, average_size=2)
    grow(model, 2)
    path = export_policy(model, tmp_path / "policy.pt")
    obs = draw(model.observation_space, 4)
    actions, sampled, prob = run_script(path, obs)
    extra = {"bins": ""}
    th.jit.load(path, _extra_files=extra)
    (bins,) = json.loads(extra["bins"])
    np.testing.assert_allclose(actions, np.array(bins)[prob.argmax(axis=1)], atol=1e-6)
    np.testing.assert_allclose(actions, model.predict(obs, deterministic=True)[0], atol=1e-6)
    assert np.abs(sampled[:, None] - bins).max(axis=2).min(axis=1).max() < 1e-5


@pytest.mark.parametrize("how", ["of the model", "object", "pkl", "npz"])
def test_normalisation_is_folded_in(how, tmp_path):
    """Raw observations give what SB3 gives for those that it has normalised, clipping included."""
    model = make_normalised("box", "MlpPolicy", clip_obs=1.5, epsilon=0.5)
    normalize = model.get_vec_normalize_env()
    normalize.save(tmp_path / "normalize.pkl")
    save_vec_normalize(tmp_path / "normalize.npz", normalize)
    source = {"of the model": None, "object": normalize}.get(how, str(tmp_path / f"normalize.{how}"))
    path = export_policy(model if source is None else model.policy, tmp_path / "policy.pt", source)
    obs = np.random.default_rng(0).normal(2, 4, (50, 4)).astype(np.float32)
    actions, _, prob = run_script(path, obs)
    normalised = normalize.normalize_obs(obs)
    assert (np.abs(normalised) == 1.5).any()
    np.testing.assert_allclose(prob, slow_prob(model.policy, normalised), atol=1e-5)
    np.testing.assert_array_equal(actions, model.policy.predict(normalised, deterministic=True)[0])


def test_normalised_rewards_leave_observations_alone(tmp_path):
    """VecNormalize has no statistics of observations then."""
    model = make_model(VecNormalize(DummyVecEnv([RandomObsEnv]), norm_obs=False))
    grow(model, 3)
    obs = draw(model.observation_space, 5)
    *_, prob = run_script(export_policy(model, tmp_path / "policy.pt"), obs)
    np.testing.assert_allclose(prob, slow_prob(model.policy, obs), atol=1e-5)


def test_statistics_far_from_zero(tmp_path):
    """In single precision, subtracting such a mean would lose the digits that count."""
    model = make_normalised("box", "MlpPolicy")
    rms = model.get_vec_normalize_env().obs_rms
    rms.mean, rms.var = np.full(4, 20_000.0004), np.full(4, 0.25)
    path = export_policy(model, tmp_path / "policy.pt")
    obs = np.random.default_rng(0).normal(20_000, 0.5, (50, 4)).astype(np.float32)
    prob = slow_prob(model.policy, model.get_vec_normalize_env().normalize_obs(obs))
    np.testing.assert_allclose(run_script(path, obs)[2], prob, atol=1e-5)


def test_images_that_are_not_normalised(tmp_path):
    policy_kwargs = dict(normalize_images=False, features_extractor_kwargs=dict(features_dim=8))
    model = make_model(RandomObsEnv("image"), "CnnPolicy", policy_kwargs=policy_kwargs)
    grow(model, 2)
    model.policy.frozen_critics.weights.scale /= 1e5  # pixels are large, and several bins shall be probable
    obs = draw(model.observation_space, 5)
    *_, prob = run_script(export_policy(model, tmp_path / "policy.pt"), obs)
    np.testing.assert_allclose(prob, slow_prob(model.policy, obs), atol=1e-4)


def test_values_far_from_zero(tmp_path):
    """As with large returns: what single precision rounds of the logits is no error of the file."""
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    pytest.importorskip("onnxscript", reason="needs the extra export")
    model = make_model(RandomObsEnv())
    for i in range(3):
        randomise(model.policy.critics, i)
        with th.no_grad():
            [*model.policy.critics.parameters()][-1].add_(2e4)
        model.policy.push_critics(1.0, 0.1)
    assert export_policy(model, tmp_path / "policy.onnx").is_file()


class AwkwardDict(RandomObsEnv):
    """A key that is also the name of an output, and whole numbers that are normalised."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict(
            action=spaces.Box(-1, 1, (2,)), count=spaces.Box(0, 255, (3,), np.uint8), b=spaces.Discrete(3)
        )

    def step(self, action):
        return self.observation_space.sample(), 1.0, True, False, {}


def test_awkward_observations(tmp_path):
    """ONNX files take them as environments return them."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    pytest.importorskip("onnxscript", reason="needs the extra export")
    env = VecNormalize(DummyVecEnv([AwkwardDict]), norm_obs_keys=["count"])
    model = make_model(env, "MultiInputPolicy")
    grow(model, 3)
    env.obs_rms["count"].mean, env.obs_rms["count"].var = np.full(3, 100.0), np.full(3, 400.0)
    session = onnxruntime.InferenceSession(export_policy(model, tmp_path / "policy.onnx"))
    assert {x.name: x.type for x in session.get_inputs()} == {
        "obs_action": "tensor(float)", "b": "tensor(int64)", "count": "tensor(uint8)",
    }  # fmt: skip
    obs = draw(model.observation_space, 6)
    arrays = {"obs_action" if key == "action" else key: x for key, x in obs.items()}
    expected = slow_prob(model.policy, env.normalize_obs(obs))
    np.testing.assert_allclose(session.run(["prob"], arrays)[0], expected, atol=1e-4)


ROBOT = """
import json, sys
sys.modules["torch"] = None  # an import of it would fail
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
assert {x.shape[0] for x in [*session.get_inputs(), *session.get_outputs()]} == {"batch"}
obs = dict(np.load(sys.argv[2]))
action, prob = session.run(["action", "prob"], obs)
single = session.run(["action"], {key: x[:1] for key, x in obs.items()})[0]
meta = session.get_modelmeta().custom_metadata_map
(sampled,) = session.run(["sample"], {key: x[:1].repeat(2000, 0) for key, x in obs.items()})
again = session.run(["sample"], {key: x[:1].repeat(2000, 0) for key, x in obs.items()})[0]
assert (sampled != again).any()
np.savez(sys.argv[3], action=action, single=single, prob=prob, sampled=sampled, meta=json.dumps(meta))
"""


@pytest.mark.parametrize(
    ("kind", "policy", "action_space"),
    [("dict", "MultiInputPolicy", spaces.Box(-2, 3, (2,))), ("box", "MlpPolicy", spaces.MultiDiscrete([2, 3]))],
)
def test_onnx_without_torch(kind, policy, action_space, tmp_path, capfd):
    """A second process has onnxruntime and NumPy only; its samples follow the policy."""
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    pytest.importorskip("onnxscript", reason="needs the extra export")
    keys = dict(norm_obs_keys=["a"]) if kind == "dict" else {}
    model = make_normalised(kind, policy, action_space, **keys)
    model.policy.frozen_critics.weights.scale /= 20  # several bins are probable
    path = export_policy(model, tmp_path / "policy.onnx")
    assert "not installed" not in capfd.readouterr().err  # packages that PyTorch's exporter could use
    obs = draw(model.observation_space, 7)
    np.savez(tmp_path / "obs.npz", **(obs if isinstance(obs, dict) else dict(obs=obs)))
    result = tmp_path / "result.npz"
    subprocess.run([sys.executable, "-c", ROBOT, path, tmp_path / "obs.npz", result], check=True)

    found, normalised = np.load(result), model.get_vec_normalize_env().normalize_obs(obs)
    expected = model.policy.predict(normalised, deterministic=True)[0]
    np.testing.assert_allclose(found["action"], expected, atol=1e-4)
    np.testing.assert_allclose(found["single"], expected[:1], atol=1e-4)
    prob = slow_prob(model.policy, normalised)
    np.testing.assert_allclose(found["prob"], prob, atol=1e-4)
    assert all(action_space.contains(x.astype(action_space.dtype)) for x in found["sampled"])
    values = json.loads(json.loads(str(found["meta"]))["bins"])
    shares = [(found["sampled"][:, d] == value).mean() for d, branch in enumerate(values) for value in branch]
    np.testing.assert_allclose(shares, prob[0], atol=0.04)
    assert 0.05 < prob[0].max() < 0.95
    meta = json.loads(str(found["meta"]))
    assert meta["algorithm"] == "StaQ" and meta["action_space"] == str(action_space)


def test_torch_export(tmp_path):
    model = make_normalised("box", "MlpPolicy")
    path = export_policy(model, tmp_path / "policy.pt2")
    extra = dict.fromkeys(METADATA, "")
    module = th.export.load(path, extra_files=extra).module()
    assert [json.loads(extra[name]) for name in METADATA] == [[3], [[0, 1, 2]], ["obs"]]
    for n in (1, 6):
        obs = draw(model.observation_space, n)
        normalised = model.get_vec_normalize_env().normalize_obs(obs)
        np.testing.assert_allclose(module(th.as_tensor(obs))[2], slow_prob(model.policy, normalised), atol=1e-5)


@pytest.mark.parametrize("eval_policy", ["average", "last"])
def test_either_policy(eval_policy, tmp_path):
    """The choice is made for the file only."""
    other = {"average": "last", "last": "average"}[eval_policy]
    model = make_model(RandomObsEnv(), eval_policy=other, memory_size=3, average_window=1.0, average_size=8)
    grow(model, 8)
    obs = draw(model.observation_space, 5)
    *_, prob = run_script(export_policy(model, tmp_path / "policy.pt", eval_policy=eval_policy), obs)
    assert model.policy.eval_policy == other
    model.policy.eval_policy = eval_policy
    np.testing.assert_allclose(prob, slow_prob(model.policy, obs), atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_the_rest_of_the_stack_takes_no_room(suffix, tmp_path):
    """Files of two critics that act are of one size, whatever else is on the stack."""
    sizes = []
    for n in (2, 100):
        average = dict(eval_policy="average", average_window=1.0, average_size=2)
        model = make_model("CartPole-v1", memory_size=n, **average)
        grow(model, n)
        sizes.append(export_policy(model, tmp_path / f"policy{suffix}").stat().st_size)
    assert sizes[1] <= sizes[0] + 1000


class Branching(BaseFeaturesExtractor):
    """Takes one of two ways by the values that it sees: a trace knows one of them only."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 4)

    def forward(self, obs):
        return obs if obs.mean() > 0 else -3 * obs


def test_failure_leaves_the_old_file(tmp_path):
    model = make_model(RandomObsEnv(), policy_kwargs=dict(features_extractor_class=Branching))
    grow(model, 3)
    path = tmp_path / "policy.pt"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="The exported file would be wrong, so it was not written: at 64 obs"):
        export_policy(model, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("wrong", ["actions", "probabilities", "of one observation"])
def test_outputs_are_checked(wrong, monkeypatch, tmp_path):
    """Each alone, for batches of several sizes; and numbers that are none differ from any."""
    model, run = make_model(RandomObsEnv()), export._run
    grow(model, 2)

    def run_wrong(*args):
        action, sample, prob = run(*args)
        if wrong == "actions":
            return [action + 1, sample, prob]
        is_right = wrong == "of one observation" and len(prob) > 1
        return [action, sample, prob if is_right else np.full_like(prob, np.nan)]

    monkeypatch.setattr(export, "_run", run_wrong)
    with pytest.raises(RuntimeError, match="The exported file would be wrong, so it was not written"):
        export_policy(model, tmp_path / "policy.pt")
    assert not list(tmp_path.iterdir())


def test_samples_are_checked(monkeypatch, tmp_path):
    """Those of a bin that does not exist are no actions of the policy."""
    model = make_model(RandomObsEnv())
    grow(model, 2)
    monkeypatch.setattr(
        type(model.policy.branches), "sample", lambda self, log_prob: self.last.expand(len(log_prob), -1) + 1
    )
    with pytest.raises(RuntimeError, match=r"not written: .* sampled actions are not all possible"):
        export_policy(model, tmp_path / "policy.pt")
    assert not list(tmp_path.iterdir())


def test_missing_packages(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = make_model()
    grow(model, 1)
    with pytest.raises(ImportError, match=r'onnxruntime missing. Please run: pip install "sb3-staq\[export\]"'):
        export_policy(model, tmp_path / "policy.onnx")
    export_policy(model, tmp_path / "policy.pt")


def test_bad_arguments(tmp_path):
    model = make_model(RandomObsEnv())
    with pytest.raises(ValueError, match=r"Invalid model=.*: expected one with at least one policy update"):
        export_policy(model, tmp_path / "policy.pt")
    grow(model, 1)
    with pytest.raises(ValueError, match=r"Invalid path='policy': expected a name that ends in .onnx, .pt, .pt2"):
        export_policy(model, "policy")
    with pytest.raises(ValueError, match="Invalid eval_policy='mean': expected 'average' or 'best' or 'last'"):
        export_policy(model, tmp_path / "policy.pt", eval_policy="mean")
    with pytest.raises(ValueError, match="Invalid vec_normalize=3: expected VecNormalize"):
        export_policy(model, tmp_path / "policy.pt", vec_normalize=3)
    other = VecNormalize(DummyVecEnv([lambda: RandomObsEnv("image")]))
    with pytest.raises(ValueError, match=r"Invalid vec_normalize: expected shape \(4,\) of 'obs', got \(36, 36, 1\)"):
        export_policy(model, tmp_path / "policy.pt", vec_normalize=other)


def test_command_line(monkeypatch, capsys, tmp_path):
    """The stack, then a student with the statistics of VecNormalize, from files; of two environments."""
    env = VecNormalize(DummyVecEnv([RandomObsEnv] * 2))
    monkeypatch.setattr(export, "make_vec_env", lambda name, n_envs: DummyVecEnv([RandomObsEnv] * n_envs))
    model = make_model(env, eval_policy="average")
    model.learn(60)
    model.save(tmp_path / "model.zip")
    model.eval_policy = "last"  # which is asked for below, unlike what was saved
    model.save_replay_buffer(tmp_path / "replay.npz")
    save_vec_normalize(tmp_path / "normalize.npz", env)
    paths = [str(tmp_path / name) for name in ("model.zip", "policy.pt", "normalize.npz", "replay.npz")]
    obs = draw(env.observation_space, 40)
    expected = slow_prob(model.policy, env.normalize_obs(obs))

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["export", *paths[:2], "--vecnormalize", paths[2], *args])
        export.main()
        return run_script(paths[1], obs)[2]

    np.testing.assert_allclose(run("--policy", "last"), expected, atol=1e-5)
    options = ["--policy", "last", "--env", "X", "--replay-buffer", paths[3], "--net-arch", "32", "--max-kl", "0.05"]
    prob = run("--distill", *options)
    report = capsys.readouterr().out
    assert "max_kl=0.05 was reached" in report
    assert str(4 * 32 + 32 + 32 * 3 + 3) in report.split()  # parameters of a student with 32 hidden units
    assert (expected * np.log(expected / prob)).sum(axis=1).mean() < 0.2
    with pytest.raises(SystemExit):
        run("--distill")
    assert "--distill needs --env" in capsys.readouterr().err
    for name, value in (("--net-arch", "4"), ("--max-kl", "0.5"), ("--replay-buffer", paths[3])):
        with pytest.raises(SystemExit):
            run(name, value)
        assert f"{name} needs --distill" in capsys.readouterr().err


def test_command_line_for_hindsight_experience_replay(monkeypatch, tmp_path):
    """Its replay buffer needs an environment, exporting does not."""
    model = make_model(BitFlippingEnv(n_bits=3), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer)
    grow(model, 2)
    model.save(tmp_path / "model.zip")
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "model.zip"), str(tmp_path / "policy.pt")])
    export.main()
    obs = draw(model.observation_space, 5)
    np.testing.assert_allclose(run_script(tmp_path / "policy.pt", obs)[2], slow_prob(model.policy, obs), atol=1e-5)


def test_command_line_runs_nothing_of_the_files(monkeypatch, capsys, tmp_path):
    """Unless it is told to."""
    env = VecNormalize(DummyVecEnv([RandomObsEnv]))
    own = dict(policy_kwargs=dict(features_extractor_class=Branching))
    for name, kwargs in (("plain", {}), ("own", own)):
        model = make_model(env, **kwargs)
        grow(model, 2)
        model.save(tmp_path / f"{name}.zip")
    env.save(tmp_path / "normalize.pkl")

    def run(model, *args):
        monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / model), str(tmp_path / "policy.pt"), *args])
        export.main()

    with pytest.raises(
        ValueError, match=r"own.zip has code for policy_kwargs \(the class .*Branching\).* or weights_only=False"
    ):
        run("own.zip")
    options = ["--vecnormalize", str(tmp_path / "normalize.pkl")]
    with pytest.raises(SystemExit):
        run("plain.zip", *options)
    assert 'normalize.pkl can run code; expected an ".npz", or --no-weights-only' in capsys.readouterr().err
    assert not (tmp_path / "policy.pt").exists()
    run("plain.zip", *options, "--no-weights-only")
    assert (tmp_path / "policy.pt").exists()


def test_module_runs(tmp_path):
    model = make_model(RandomObsEnv())
    grow(model, 2)
    model.save(tmp_path / "model.zip")
    command = [sys.executable, "-m", "sb3_staq.export", tmp_path / "model.zip", tmp_path / "policy.pt"]
    subprocess.run(command, check=True)
    loaded = StaQ.load(tmp_path / "model.zip")
    obs = draw(model.observation_space, 5)
    actions, *_ = run_script(tmp_path / "policy.pt", obs)
    np.testing.assert_array_equal(actions, loaded.predict(obs, deterministic=True)[0])


@pytest.mark.slow
def test_benchmark(tmp_path):
    """A row for the stack and one for its student, of an agent in the folders of RL Zoo3."""
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    model = make_model("CartPole-v1")
    grow(model, 3)
    model.save(tmp_path / "CartPole-v1.zip")
    command = [sys.executable, "-m", "benchmarks.distillation", "--max-steps", "20", "--folder", tmp_path]
    command += ["--agent", "tiny, M = 3", tmp_path, "CartPole-v1"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    lines = (tmp_path / "report.md").read_text().splitlines()
    heading, _, stack, student = ([cell.strip() for cell in line.split("|")] for line in lines)
    assert stack[1:4] == ["tiny, M = 3", "stack", "6"] and student[1:4] == ["tiny, M = 3", "student", "1"]
    assert len(stack) == len(student) == len(heading)
    assert "networks that act" in heading and (tmp_path / "tiny_m_3.csv").is_file()
