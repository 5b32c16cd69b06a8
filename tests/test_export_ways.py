"""Policies outside of SB3: traced, exported, compiled and as ONNX graphs, with batches of any size."""

import io
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomObsEnv, make_model, randomise

BOX = spaces.Box(-2, 3, (2,), np.float32)
MODELS = {
    "discrete": lambda **kwargs: make_model(RandomObsEnv(), net_arch=[16, 16], **kwargs),
    "Box": lambda **kwargs: make_model(
        RandomObsEnv(action_space=BOX), net_arch=[16, 16], critic="joint", critic_reduction="min", **kwargs
    ),
    "image": lambda **kwargs: make_model(
        RandomObsEnv("image"), "CnnPolicy", (), dict(features_extractor_kwargs=dict(features_dim=16)), **kwargs
    ),
}
EXAMPLE_SIZE = 4
BATCH_SIZES = (1, 2, 7, 33)


class Actor(th.nn.Module):
    """What SB3's documentation exports."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, observation):
        return self.policy(observation, deterministic=True)


class Logits(Actor):
    """The policy itself."""

    def forward(self, observation):
        return self.policy.logits(observation)


@pytest.fixture(params=["average", "last"])
def eval_policy(request):
    return request.param


@pytest.fixture(params=MODELS)
def model(request, eval_policy):
    """A model with a stack that has entries which only the average needs."""
    model = MODELS[request.param](eval_policy=eval_policy, memory_size=3, average_window=0.9, average_size=4)
    for i in range(8):
        randomise(model.policy.additive_critics, seed=i, std=0.3)
        model.policy.push_critics(1.0 + i, 0.5)
    return model


def sample(model, n, seed=0):
    """Observations as the policy takes them."""
    shape, generator = (n, *model.observation_space.shape), np.random.default_rng(seed)
    if model.observation_space.dtype == np.uint8:
        return th.as_tensor(generator.integers(0, 256, shape, dtype=np.uint8))
    return th.as_tensor(generator.uniform(-1, 1, shape).astype(np.float32))


def trace(module, obs):
    return th.jit.trace(module, (obs,))


def export(module, obs):
    return th.export.export(module, (obs,), dynamic_shapes=({0: th.export.Dim("batch")},)).module()


def compile_(module, obs):
    th.compiler.reset()
    return th.compile(module, backend="eager")


def onnxruntime_session(graph):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install sb3-staq[export]")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options)
    name = session.get_inputs()[0].name
    return lambda x: th.as_tensor(session.run(None, {name: x.numpy()})[0])


def legacy_onnx(module, obs):
    pytest.importorskip("onnx", reason="onnx is not installed: pip install sb3-staq[export]")
    file = io.BytesIO()
    axes = {"observation": {0: "batch"}, "output": {0: "batch"}}
    names = dict(input_names=["observation"], output_names=["output"], dynamic_axes=axes)
    th.onnx.export(module, (obs,), file, opset_version=17, dynamo=False, **names)
    return onnxruntime_session(file.getvalue())


def dynamo_onnx(module, obs):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install sb3-staq[export]")
    shapes = ({0: th.export.Dim("batch")},)
    program = th.onnx.export(module, (obs,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    file = io.BytesIO()
    program.save(file)
    return onnxruntime_session(file.getvalue())


WAYS = {"trace": trace, "export": export, "compile": compile_, "legacy_onnx": legacy_onnx, "dynamo_onnx": dynamo_onnx}


def made(way, module, obs):
    """Exported; PyTorch warns of its own plans while it does that, and of constants in a trace."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning, th.jit.TracerWarning):
            warnings.simplefilter("ignore", category)
        return WAYS[way](module, obs)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow) if way in ("dynamo_onnx", "compile") else way for way in WAYS]
)
def test_exported_policy(way, model, eval_policy):
    """Acts as the model does and has its logits, at other observations and in batches of other sizes."""
    policy = model.policy
    assert policy.eval_policy == eval_policy
    example = sample(model, EXAMPLE_SIZE, seed=100)
    for module in (Actor(policy).eval(), Logits(policy).eval()):
        exported = made(way, module, example)
        for n in (*BATCH_SIZES, EXAMPLE_SIZE):
            obs = sample(model, n, seed=n)
            with th.no_grad():
                actual, expected = exported(obs), module(obs)
            assert actual.shape == expected.shape
            th.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
            if isinstance(module, Logits):
                scale = policy.frozen_critics.weights.scale
                sums = policy.logit_sums(obs, eval_policy)
                th.testing.assert_close(actual, scale * sums, rtol=1e-5, atol=1e-4)
            else:
                predicted, _ = model.predict(obs.numpy(), deterministic=True)
                actions = actual.numpy().reshape(predicted.shape)
                if isinstance(model.action_space, spaces.Box):
                    actions = policy.unscale_action(actions)
                np.testing.assert_allclose(actions, predicted, rtol=1e-5, atol=1e-4)


def test_the_two_policies_differ():
    """So the tests above tell which of them is exported."""
    model = MODELS["discrete"](memory_size=3, average_window=0.9, average_size=4)
    for i in range(8):
        randomise(model.policy.additive_critics, seed=i, std=0.3)
        model.policy.push_critics(1.0 + i, 0.5)
    obs = sample(model, 33)
    logits = []
    for eval_policy in ("average", "last"):
        model.policy.eval_policy = eval_policy
        logits.append(model.policy.logits(obs))
    assert (logits[0] - logits[1]).abs().max() > 0.1


@pytest.mark.parametrize("eval_policy", ["average", "last"])
def test_compiled_policy_follows_policy_updates(eval_policy):
    """Unlike a policy that is exported, one that is compiled is still the model's."""
    model = MODELS["discrete"](eval_policy=eval_policy, memory_size=3)
    th.compiler.reset()
    compiled = th.compile(Logits(model.policy), backend="eager")
    obs = sample(model, 9)
    for i in range(6):
        randomise(model.policy.critics, seed=i)
        model.policy.push_critics(1.0 + i, 0.5)
        th.testing.assert_close(compiled(obs), model.policy.logits(obs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["discrete", "image"])
def test_exporting_changes_nothing(kind):
    """The model acts and learns on afterwards, also if it has never acted before."""
    model, other = (MODELS[kind](memory_size=3) for _ in range(2))
    for x in (model, other):
        for i in range(5):
            randomise(x.policy.critics, seed=i, std=0.3)
            x.policy.push_critics(1.0 + i, 0.5)
    obs = sample(model, 9)
    made("trace", Actor(model.policy), obs)
    made("export", Actor(model.policy), obs)
    assert th.equal(model.policy.logits(obs), other.policy.logits(obs))
    model.learn(50)
    assert th.isfinite(model.policy.logits(obs)).all()
