"""Batched critics against ordinary networks one by one, and the life of the stack of frozen critics."""

import copy
import gc
import inspect
import mmap
import pickle
import signal

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    RandomObsEnv,
    by_age,
    make_model,
    members,
    randomise,
    relative_error,
    sample_obs,
    slow_average,
    slow_logit_sums,
    slow_q_values,
)
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch._subclasses import FakeTensor
from torch.func import functional_call

from sb3_staq import CnnPolicy, MlpPolicy, MultiInputPolicy, kernels
from sb3_staq.mirror_descent import averaged_updates


class NormExtractor(BaseFeaturesExtractor):
    """A features extractor with parameters of its own, one layer without bias, and dropout."""

    def __init__(self, observation_space, features_dim=6):
        super().__init__(observation_space, features_dim)
        n = int(np.prod(observation_space.shape))
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(n, 6, bias=False), nn.LayerNorm(6), nn.Dropout(0.5))

    def forward(self, obs):
        return self.net(obs)


class RecurrentExtractor(BaseFeaturesExtractor):
    """What PyTorch cannot batch over networks: a recurrent layer, and writing in place."""

    def __init__(self, observation_space, features_dim=5):
        super().__init__(observation_space, features_dim)
        self.gru = nn.GRU(2, 5, batch_first=True)

    def forward(self, obs):
        features = th.zeros(len(obs), 5)
        features += self.gru(obs.unflatten(1, (2, 2)))[1][0]
        return features


BOX = spaces.Box(-1, 1, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
DICT = spaces.Dict(img=IMAGE, vec=spaces.Box(-2, 2, (3,), np.float64), kind=spaces.Discrete(4))
ARCHITECTURES = {
    "mlp": (MlpPolicy, BOX, dict(net_arch=[16, 8])),
    "wide_input": (MlpPolicy, spaces.Box(-1, 1, (3, 40), np.float32), dict(net_arch=[8])),
    "linear": (MlpPolicy, BOX, dict(net_arch=[])),
    "tanh": (MlpPolicy, BOX, dict(net_arch=[8], activation_fn=nn.Tanh)),
    "prelu": (MlpPolicy, BOX, dict(net_arch=[8, 8], activation_fn=nn.PReLU)),
    "one_critic": (MlpPolicy, BOX, dict(net_arch=[8], n_critics=1)),
    "three_critics": (MlpPolicy, BOX, dict(net_arch=[8], n_critics=3)),
    "extractor": (MlpPolicy, BOX, dict(net_arch=[8], features_extractor_class=NormExtractor)),
    "recurrent": (MlpPolicy, BOX, dict(net_arch=[8], features_extractor_class=RecurrentExtractor)),
    "layer_norm": (MlpPolicy, BOX, dict(net_arch=[16, 8], layer_norm=True)),
    "discrete": (MlpPolicy, spaces.Discrete(5), dict(net_arch=[8])),
    "multi_discrete": (MlpPolicy, spaces.MultiDiscrete([3, 4]), dict(net_arch=[8])),
    "multi_binary": (MlpPolicy, spaces.MultiBinary(5), dict(net_arch=[8])),
    "image": (CnnPolicy, IMAGE, dict(features_extractor_kwargs=dict(features_dim=8))),
    "image_hidden": (CnnPolicy, IMAGE, dict(net_arch=[8], features_extractor_kwargs=dict(features_dim=8))),
    "dict": (MultiInputPolicy, DICT, dict(net_arch=[8], features_extractor_kwargs=dict(cnn_output_dim=8))),
    "branches": (MlpPolicy, BOX, dict(net_arch=[8, 8], action_space=spaces.MultiDiscrete([2, 3, 4]))),
    "branches_layer_norm": (
        MlpPolicy,
        BOX,
        dict(net_arch=[8, 8], action_space=spaces.MultiDiscrete([2, 3, 4]), layer_norm=True),
    ),
    "branches_linear": (MlpPolicy, BOX, dict(net_arch=[], action_space=spaces.MultiBinary(3))),
    "box_axis": (MlpPolicy, BOX, dict(net_arch=[8], action_space=spaces.Box(-1, 1, (3,)), action_grid="axis")),
}


def make_policy(architecture="mlp", **kwargs):
    policy_class, space, policy_kwargs = ARCHITECTURES[architecture]
    own = {"action_space": spaces.Discrete(3), "memory_size": 4, "eval_policy": "last", "average_size": 0}
    policy_kwargs = {**own, **policy_kwargs, **kwargs}
    th.manual_seed(0)
    policy = policy_class(space, lr_schedule=lambda _: 1e-3, **policy_kwargs)
    randomise(policy.critics, seed=0)
    return policy


def push(policy, seed, kl_coef=1.0, ent_coef=0.1):
    """Push random critics; return what they are, as ordinary networks."""
    randomise(policy.critics, seed)
    nets = members(policy.critics.frozen_copy())
    policy.push_critics(kl_coef, ent_coef)
    return nets


def loop_sum(policy, stack, obs):
    """``sum_i w_i mean_j Q_ij`` over ordinary networks."""
    with th.no_grad():
        values = [th.stack([net(obs) for net in nets]).mean(0) for nets in stack]
    return sum(weight * value for weight, value in zip(policy.frozen_critics.weights.values, values, strict=True))


# Batched passes


@pytest.fixture(params=["AMD", "another maker"])
def processor(request, monkeypatch):
    """As on a processor of this maker, which decides how products are computed, with sizes for small networks."""
    monkeypatch.setattr(kernels, "_on_amd", lambda: request.param == "AMD")
    monkeypatch.setattr(kernels, "READ_AHEAD_BYTES", 2 * 32 * 32 * 4)  # two networks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ensemble_equals_networks_one_by_one(architecture, processor):
    """Values and gradients of the online critics."""
    policy = make_policy(architecture)
    policy.critics.eval()  # no dropout
    obs = policy.preprocess(sample_obs(policy.observation_space, 9))
    nets = members(policy.critics)
    assert len(nets) == policy.n_critics

    batched = policy.critics(obs)
    one_by_one = th.stack([net(obs) for net in nets])
    n_bins = policy.branches.n_bins
    assert batched.shape == (policy.n_critics, 9, n_bins)
    assert batched.std() > 0.01
    assert relative_error(batched.detach(), one_by_one.detach()) < 1e-5

    target = th.linspace(-1, 1, 9 * n_bins).reshape(9, n_bins)
    ((batched - target) ** 2).sum().backward()
    ((one_by_one - target) ** 2).sum().backward()
    for name, param in policy.critics.net.named_parameters():
        expected = th.stack([net.get_parameter(name).grad for net in nets])
        assert relative_error(param.grad, expected) < 1e-4, name


@pytest.mark.parametrize("n_hidden", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [3, 40])
def test_derivatives_of_any_order(n_hidden, batch_size, processor):
    """Of values by observations and parameters, and of these derivatives: as those of ordinary networks."""
    policy = make_policy("mlp", net_arch=[12] * n_hidden)
    randomise(policy.critics, seed=0)
    obs = policy.preprocess(sample_obs(policy.observation_space, batch_size))

    def derivatives(critics, params):
        x = obs.clone().requires_grad_()
        first = th.autograd.grad(critics(x).square().sum(), [x, *params], create_graph=True)
        loss = sum(grad.square().sum() for grad in first)
        return [*first, *th.autograd.grad(loss, [x, *params])]

    batched = derivatives(policy.critics, list(policy.critics.params.values()))
    nets = members(policy.critics)
    params = [
        th.stack([net.get_parameter(name).data for net in nets]).requires_grad_() for name in policy.critics.params
    ]

    def one_by_one(x):
        copies = [dict(zip(policy.critics.params, values, strict=True)) for values in zip(*params, strict=True)]
        return th.stack([functional_call(nets[0], copy, (x,)) for copy in copies])

    for actual, expected in zip(batched, derivatives(one_by_one, params), strict=True):
        assert expected.abs().max() > 0
        assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stack_equals_networks_one_by_one(architecture, processor):
    """The weighted sum, with a stack that has been full for a while, at several batch sizes."""
    policy = make_policy(architecture)
    stack = []
    for i in range(7):
        stack = [*stack, push(policy, seed=i, kl_coef=1.0 + i, ent_coef=0.1 + 0.2 * (i % 3))][-4:]
    for batch_size in (1, 2, 33):
        obs = sample_obs(policy.observation_space, batch_size)
        sums = policy.logit_sums(obs)
        assert sums.shape == (batch_size, policy.branches.n_bins)
        assert sums.dtype == th.float32
        assert not sums.requires_grad  # none is asked for
        expected = loop_sum(policy, stack, policy.preprocess(obs))
        assert expected.std() > 0.01
        assert relative_error(sums, expected) < 1e-5
        th.testing.assert_close(policy.logits(obs), policy.frozen_critics.weights.scale * sums, rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch_size", [1, 8, 256, 5000])
@pytest.mark.parametrize("memory_size", [1, 2, 60])
def test_stack_of_any_size_at_any_batch_size(memory_size, batch_size, processor):
    """Whatever way of evaluation is chosen for these sizes: the same sums, to float precision."""
    policy = make_policy("mlp", memory_size=memory_size, net_arch=[32, 32])
    for i in range(memory_size + 7):
        push(policy, seed=i, kl_coef=20.0, ent_coef=0.4)
    obs = sample_obs(policy.observation_space, batch_size)
    assert relative_error(policy.logit_sums(obs), slow_logit_sums(policy, obs)) < 2e-6


def test_batches_do_not_mix_observations():
    """The value at an observation does not depend on what else is in the batch."""
    policy = make_policy("mlp", memory_size=20)
    for i in range(20):
        push(policy, seed=i)
    obs = sample_obs(policy.observation_space, 300)
    one_by_one = th.cat([policy.logit_sums(obs[i : i + 1]) for i in range(300)])
    assert relative_error(policy.logit_sums(obs), one_by_one) < 1e-6


def test_empty_stack_is_uniform():
    policy = make_policy("dict")
    obs = sample_obs(policy.observation_space, 5)
    assert policy.logits(obs).tolist() == [[0.0] * 3] * 5
    np.testing.assert_allclose(policy.get_distribution(obs).distribution.probs, 1 / 3, rtol=1e-6)


def test_new_critics_start_at_zero():
    """The first policies are uniform whatever the observations."""
    policy = MlpPolicy(BOX, spaces.Discrete(3), lambda _: 1e-3, net_arch=[16])
    obs = sample_obs(BOX, 5)
    assert (policy.critics(obs) == 0).all()
    policy.push_critics(1.0, 0.1)
    assert (policy.logits(obs) == 0).all()
    first, second = policy.critics.net.q_net[0].weight
    assert not th.equal(first, second)  # but the members are different networks


def test_layer_norm_makes_hidden_layers_blind_to_scale():
    """Without offsets, a larger first layer gives the same values if it is normalised, and others if not."""
    obs = sample_obs(BOX, 5)
    for layer_norm in (False, True):
        policy = make_policy("mlp", layer_norm=layer_norm)
        params = dict(policy.critics.net.named_parameters())
        params["q_net.0.bias"].data.zero_()
        before = policy.critics(obs)
        params["q_net.0.weight"].data *= 10
        assert (relative_error(policy.critics(obs).detach(), before.detach()) < 1e-3) == layer_norm


def test_preprocessing_is_sb3s():
    """Images scaled, discrete observations one-hot, and raw images if so wished."""
    for architecture in ("image", "dict", "discrete"):
        policy = make_policy(architecture)
        obs = sample_obs(policy.observation_space, 4)
        expected = preprocess_obs(obs, policy.observation_space, normalize_images=True)
        th.testing.assert_close(policy.preprocess(obs), expected)
    policy = make_policy("image", normalize_images=False, features_extractor_kwargs=dict(normalized_image=False))
    obs = sample_obs(policy.observation_space, 4)
    th.testing.assert_close(policy.preprocess(obs), obs.float())


# Growth, deletion and freezing


@pytest.mark.parametrize("memory_size", [1, 2, 5])
def test_growth_and_deletion_order(memory_size):
    """Entries are the critics at the time of their push, oldest first; a full stack loses its oldest entry."""
    policy = make_policy("mlp", memory_size=memory_size)
    obs = sample_obs(BOX, 6)
    pushed, seen = [], []
    for i in range(3 * memory_size + 1):
        randomise(policy.critics, seed=i)
        pushed.append(policy.q_values(policy.critics, obs))
        update, deleted = policy.push_critics(1.0, 0.1)
        assert len(policy.frozen_critics) == min(i + 1, memory_size)
        assert len(deleted) == len(update.deleted_weights) == int(i >= memory_size)
        for critics in deleted:
            th.testing.assert_close(policy.q_values(critics, obs), pushed[i - memory_size], rtol=0, atol=0)
        seen += deleted
        randomise(policy.critics, seed=1000 + i)  # the online critics train on
        values = [policy.q_values(entry, obs) for entry in by_age(policy)]
        for value, expected in zip(values, pushed[-memory_size:], strict=True):
            th.testing.assert_close(value, expected, rtol=0, atol=0)
        th.testing.assert_close(policy.q_values(policy.frozen_critics.newest, obs), pushed[i], rtol=0, atol=0)
    for critics, expected in zip(seen, pushed, strict=False):  # deleted entries stay what they were
        th.testing.assert_close(policy.q_values(critics, obs), expected, rtol=0, atol=0)


def test_exact_rule_keeps_everything():
    policy = make_policy("mlp", memory_size=2, logit_rule="exact")
    stack = [push(policy, seed=i, kl_coef=5.0, ent_coef=0.3) for i in range(11)]
    assert len(policy.frozen_critics) == 11
    obs = sample_obs(BOX, 6)
    assert relative_error(policy.logit_sums(obs), loop_sum(policy, stack, obs)) < 1e-5


@pytest.mark.parametrize(
    "by_age", [[1.0, -2.0, 0.5], [-1.0, -0.1, -1e-3], [0.0, 0.0, 3.0], [1.0, -1.0, 0.0], [1.0, 1e-3, 1e6]], ids=str
)
@pytest.mark.parametrize("architecture", ["mlp", "branches"])
def test_custom_weights(architecture, by_age):
    """The logits are ``sum_age w(age) Q_{k-age}``, missing critics count as zero."""
    policy = make_policy(architecture, memory_size=3, logit_rule=by_age)
    obs = sample_obs(BOX, 6)
    pushed: list[th.Tensor] = []
    for i in range(8):
        randomise(policy.critics, seed=i)
        pushed.insert(0, slow_q_values(policy.critics, obs))
        policy.push_critics(1.0 + i, 0.1)
        expected = sum(weight * q_values for weight, q_values in zip(by_age, pushed, strict=False))
        th.testing.assert_close(policy.logits(obs).double(), expected, rtol=1e-5, atol=1e-5 * max(map(abs, by_age)))


def test_no_gradient_reaches_frozen_critics():
    """Training changes nothing in the stack, and the optimizer does not know of it or of the targets."""
    model = make_model(memory_size=3)
    model.learn(70)
    policy = model.policy
    assert len(policy.frozen_critics.weights) == 3
    trained = {id(param) for group in policy.optimizer.param_groups for param in group["params"]}
    assert trained == {id(param) for param in policy.critics.parameters()}
    frozen = [*policy.frozen_critics.parameters(), *policy.critics_target.parameters()]
    assert not any(param.requires_grad for param in frozen)
    assert not any(entry.training for entry in policy.frozen_critics)

    before = copy.deepcopy(policy.frozen_critics.state_dict())
    online = copy.deepcopy(policy.critics.state_dict())
    model.policy_update_interval = 10**6
    model.train(gradient_steps=20, batch_size=16)
    after = policy.frozen_critics.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert th.equal(value, after[key]), key
    assert not any(th.equal(value, online[key]) for key, value in policy.critics.state_dict().items())
    assert all(param.grad is None for param in frozen)
    assert not policy.logits(th.zeros(2, 4)).requires_grad


def test_dropout_acts_in_training_only():
    """The policy is a function; only the gradient step draws dropout masks."""
    policy = make_policy("extractor")
    for i in range(3):
        push(policy, seed=i)
    obs = sample_obs(BOX, 8)
    policy.set_training_mode(True)
    assert th.equal(policy.logits(obs), policy.logits(obs))
    assert th.equal(policy.q_values(policy.critics_target, obs), policy.q_values(policy.critics_target, obs))
    assert not th.equal(policy.critics(obs), policy.critics(obs))


# Memory


def assert_entries_are_live(policy):
    """What is written into the parameters of an entry is what the policy evaluates: there is no second copy."""
    obs = sample_obs(policy.observation_space, 6)
    weights = policy.frozen_critics.weights.values
    for i, entry in enumerate(by_age(policy)):
        before = policy.logit_sums(obs)
        with th.no_grad():
            entry.net.q_net[-1].bias += 1.0
        after = policy.logit_sums(obs)
        th.testing.assert_close(after - before, th.full_like(before, weights[i]), rtol=1e-3, atol=1e-4)
        with th.no_grad():
            entry.net.q_net[-1].bias -= 1.0
    storages = {}
    for name, param in policy.frozen_critics.named_parameters():
        layer = name.partition(".")[2]
        storages.setdefault(layer, set()).add(param.untyped_storage().data_ptr())
    assert all(len(pointers) == 1 for pointers in storages.values())


def round_trip(policy, kind):
    if kind == "push":
        push(policy, seed=77)
    elif kind == "dtype":
        policy.to(th.float64)
        assert {param.dtype for param in policy.frozen_critics.parameters()} == {th.float64}
        policy.to(th.float32)
    elif kind == "device":
        policy.to("cpu")
    elif kind == "deepcopy":
        return copy.deepcopy(policy)
    elif kind == "pickle":
        return pickle.loads(pickle.dumps(policy.frozen_critics)), policy
    elif kind == "state_dict":
        other = make_policy("mlp", memory_size=5)
        other.load_state_dict(policy.state_dict())
        return other
    return policy


@pytest.fixture(params=["usual", "large", "large, refused"])
def pages(request, monkeypatch):
    """How the memory of the stack is asked for: stacks of these tests would be too small for large pages."""
    if request.param == "usual":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
        yield
        return
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("this system has no way to ask for large pages")
    asked = []

    class Memory(mmap.mmap):
        def madvise(self, *args):
            asked.append(args)
            if request.param == "large, refused":
                raise OSError("invalid argument")
            return super().madvise(*args)

    monkeypatch.setattr(mmap, "mmap", Memory)
    monkeypatch.setattr(kernels, "LARGE_PAGE_BYTES", 1)
    yield
    assert set(asked) == {(mmap.MADV_HUGEPAGE,)}


@pytest.mark.usefixtures("pages")
@pytest.mark.parametrize("n_entries", [1, 3, 5, 8])
@pytest.mark.parametrize("kind", ["push", "dtype", "device", "deepcopy", "pickle", "state_dict"])
def test_block_and_entries_share_memory(kind, n_entries):
    """Also after everything that moves or copies a module; and the stack grows on correctly afterwards."""
    policy = make_policy("mlp", memory_size=5)
    for i in range(n_entries):
        push(policy, seed=i)
    obs = sample_obs(BOX, 6)
    before = policy.logit_sums(obs)
    if kind == "pickle":
        copied, original = round_trip(policy, kind)
        policy = make_policy("mlp", memory_size=5)
        policy.frozen_critics = copied
    else:
        original = policy
        policy = round_trip(policy, kind)
    if kind != "push":
        th.testing.assert_close(policy.logit_sums(obs), before, rtol=0, atol=0)
        assert policy.frozen_critics.weights.values == original.frozen_critics.weights.values
    assert not any(param.requires_grad for param in policy.frozen_critics.parameters())
    assert_entries_are_live(policy)
    expected = original.logit_sums(obs)
    for i in range(7):
        push(policy, seed=100 + i)
        assert_entries_are_live(policy)
        assert relative_error(policy.logit_sums(obs), slow_logit_sums(policy, obs)) < 1e-5
    if policy is not original:  # a copy is independent of its original
        th.testing.assert_close(original.logit_sums(obs), expected, rtol=0, atol=0)


def live_tensor_bytes():
    """Bytes of all distinct storages of all tensors that are alive; PyTorch's compiler keeps some without memory."""
    gc.collect()
    storages = {}
    for obj in gc.get_objects():
        if issubclass(type(obj), th.Tensor) and type(obj) is not FakeTensor:
            storage = obj.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("memory_size", [33, 100])
def test_memory_of_a_full_stack(memory_size):
    """A full stack takes at most 5% more than its critics' parameters: no copies, no spare capacity."""
    before = live_tensor_bytes()
    policy = make_policy("mlp", memory_size=memory_size, net_arch=[64, 64])
    empty = live_tensor_bytes() - before
    for i in range(memory_size + 20):
        push(policy, seed=i)
        policy.logit_sums(th.zeros(1, 4))
    one_entry = sum(param.nbytes for param in policy.critics.parameters())
    assert live_tensor_bytes() - before - empty <= 1.05 * memory_size * one_entry


def test_memory_while_growing_is_at_most_doubled():
    policy = make_policy("mlp", memory_size=200, net_arch=[64, 64])
    one_entry = sum(param.nbytes for param in policy.critics.parameters())
    before = live_tensor_bytes()
    for n in range(1, 71):
        push(policy, seed=n)
        if n % 23 == 0:
            assert live_tensor_bytes() - before <= 2.05 * n * one_entry


# Weights that do not matter


@pytest.mark.parametrize("coefs", [(1.0, 9.0), (1.0, 1.0), (20.0, 0.4)])
@pytest.mark.parametrize("batch_size", [3, 20_000])
def test_skipping_negligible_weights(batch_size, coefs):
    """Skipping changes the weighted average of the Q-values by less than float resolution, however old they are."""
    policy = make_policy("mlp", memory_size=40)
    for i in range(45):
        push(policy, *(i, *coefs))
    obs = sample_obs(BOX, 50)
    values = th.stack([slow_q_values(entry, obs) for entry in by_age(policy)])
    weights = th.tensor(policy.frozen_critics.weights.values, dtype=th.float64)
    # The stated bound: less than 2^-32 of the sum of the weights times max|Q| for each skipped critic, and rounding
    bound = (40 * 2.0**-32 + 1e-6) * weights.sum() * values.abs().max()
    sums = policy.logit_sums(obs.repeat(-(-batch_size // 50), 1)[:batch_size])  # skips in large batches only
    error = (sums[:50] - th.tensordot(weights, values, dims=1)[:batch_size]).abs().max()
    assert error <= bound


def test_old_critics_with_huge_values_are_within_the_bound():
    """An old critic whose values are a million times larger does count where its weight says so."""
    policy = make_policy("mlp", memory_size=10)
    randomise(policy.critics, seed=0)
    with th.no_grad():
        for param in policy.critics.net.q_net[-1].parameters():
            param *= 1e6
    policy.push_critics(1.0, 9.0)
    for i in range(5):  # the weight of the first is 1e-5 now
        push(policy, seed=i, kl_coef=1.0, ent_coef=9.0)
    obs = sample_obs(BOX, 50)
    expected = slow_logit_sums(policy, obs)
    without_first = sum(
        weight * slow_q_values(entry, obs)
        for weight, entry in list(zip(policy.frozen_critics.weights.values, by_age(policy), strict=True))[1:]
    )
    assert relative_error(without_first, expected) > 0.1
    assert relative_error(policy.logit_sums(obs), expected) < 1e-6


# Loading


@pytest.mark.parametrize("n_entries", range(6))
@pytest.mark.parametrize("n_before", [0, 2, 5, 7])
def test_a_stack_of_any_size_loads(n_before, n_entries):
    """Whatever the stack held before; and it goes on as the original does."""
    policy = make_policy("mlp", memory_size=5)
    for i in range(n_entries):
        push(policy, seed=i, kl_coef=1.0 + i)
    other = make_policy("mlp", memory_size=5)
    for i in range(n_before):
        push(other, seed=50 + i)
    other.load_state_dict(policy.state_dict())
    obs = sample_obs(BOX, 6)
    assert len(other.frozen_critics) == n_entries
    for i in range(8):
        th.testing.assert_close(other.logits(obs), policy.logits(obs), rtol=0, atol=0)
        push(policy, seed=100 + i)
        push(other, seed=100 + i)


def test_a_larger_stack_loads_and_shrinks():
    """It is the same policy; the next update deletes what is too much, as the recursion says."""
    policy = make_policy("mlp", memory_size=5)
    for i in range(5):
        push(policy, seed=i)
    obs = sample_obs(BOX, 6)
    for memory_size, logit_rule in ((3, "weight_corrected"), (9, "weight_corrected"), (3, "exact")):
        other = make_policy("mlp", memory_size=memory_size, logit_rule=logit_rule)
        other.load_state_dict(policy.state_dict())
        before = other.logit_sums(obs)
        th.testing.assert_close(before, policy.logit_sums(obs), rtol=0, atol=0)
        update, deleted = other.push_critics(1.0, 0.1)
        assert len(deleted) == (3 if (memory_size, logit_rule) == (3, "weight_corrected") else 0)
        assert len(other.frozen_critics) == 6 - len(deleted)
        q_new = other.q_values(other.frozen_critics.newest, obs)
        followed = update.apply(before, q_new, [other.q_values(critics, obs) for critics in deleted])
        assert relative_error(other.logit_sums(obs), slow_logit_sums(other, obs)) < 1e-5
        assert relative_error(followed, slow_logit_sums(other, obs)) < 1e-5


# The average


def needed_updates(n_updates, window, size):
    """Brute force: every stride-th update of the window, for the smallest power of two that leaves at most size."""
    covered = max(1, round(window * n_updates))
    stride = next(2**i for i in range(40) if covered <= 2**i * size)
    return [u for u in range(1, n_updates + 1) if u > n_updates - covered and u % stride == 0]


@pytest.mark.parametrize(("window", "size"), [(0.15, 60), (0.15, 5), (1.0, 4), (0.01, 2), (0.5, 30)])
def test_averaged_updates(window, size):
    """As by brute force; never too many, never what was not needed one update before."""
    before: set[int] = set()
    for n in range(1, 3000):
        now = list(averaged_updates(n, window, size))
        assert now == needed_updates(n, window, size)
        assert 1 <= len(now) <= size
        assert set(now) <= before | {n}
        before = set(now)
        if round(window * n) >= size:
            assert len(now) >= (size - 1) // 2


@pytest.mark.parametrize("architecture", ["mlp", "branches_layer_norm", "image", "dict"])
@pytest.mark.parametrize(("memory_size", "window", "size"), [(4, 0.5, 6), (1, 1.0, 5), (30, 0.2, 3)])
def test_two_weightings_of_one_stack(architecture, memory_size, window, size):
    """Both sums are those of ordinary networks, and nothing is kept that neither needs."""
    policy = make_policy(architecture, memory_size=memory_size, average_window=window, average_size=size)
    obs = sample_obs(policy.observation_space, 7)
    stack = policy.frozen_critics
    for i in range(60):
        push(policy, seed=i, kl_coef=1.0 + i % 3, ent_coef=0.2)
        recent = set(range(max(1, i + 2 - memory_size), i + 2))
        assert sorted(stack.updates) == sorted(recent | set(needed_updates(i + 1, window, size)))
        assert set(stack.updates[: len(stack.weights)]) == recent
        if i % 13 == 0 or i > 57:
            assert relative_error(policy.logit_sums(obs), slow_logit_sums(policy, obs)) < 1e-5
            expected = sum(stack.weights.values) * slow_average(policy, obs)
            assert relative_error(policy.logit_sums(obs, average=True), expected) < 1e-5
    policy.eval_policy = "last"
    th.testing.assert_close(policy.logits(obs), stack.weights.scale * policy.logit_sums(obs))
    policy.eval_policy = "average"
    th.testing.assert_close(policy.logits(obs), stack.weights.scale * policy.logit_sums(obs, average=True))


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "state_dict", "dtype"])
def test_both_weightings_survive(kind):
    """Copies give bitwise the same logits, and grow on as their original does."""
    policy = make_policy("mlp", memory_size=3, average_window=0.6, average_size=5)
    for i in range(17):
        push(policy, seed=i)
    if kind == "deepcopy":
        other = copy.deepcopy(policy)
    elif kind == "dtype":
        other = copy.deepcopy(policy).to(th.float64).to(th.float32)
    else:
        other = make_policy("mlp", memory_size=3, average_window=0.6, average_size=5)
        if kind == "pickle":
            other.frozen_critics = pickle.loads(pickle.dumps(policy.frozen_critics))
        else:
            other.load_state_dict(policy.state_dict())
    obs = sample_obs(BOX, 6)
    for i in range(20):
        for average in (False, True):
            assert th.equal(other.logit_sums(obs, average), policy.logit_sums(obs, average))
        push(policy, seed=100 + i)
        push(other, seed=100 + i)


# The state


def test_state_is_of_float_tensors():
    """What users do with any state_dict: random values of the same kind, averages, other devices."""
    policy = make_policy("mlp", memory_size=3, average_window=0.6, average_size=5)
    for i in range(9):
        push(policy, seed=i)
    state = policy.state_dict()
    assert {value.dtype for value in state.values()} == {th.float32}
    other = make_policy("mlp", memory_size=3, average_window=0.6, average_size=5)
    other.load_state_dict({key: th.rand_like(value) for key, value in state.items()})
    obs = sample_obs(BOX, 6)
    for average in (False, True):
        assert th.isfinite(other.logit_sums(obs, average)).all()
    push(other, seed=0)
    assert relative_error(other.logit_sums(obs), slow_logit_sums(other, obs)) < 1e-5


@pytest.mark.parametrize(
    ("key", "damage"),
    [
        ("weights", lambda x: x.fill_(float("nan"))),
        ("updates", lambda x: x.fill_(float("inf"))),
        ("weights", lambda x: x[:, :2]),
        ("weights", lambda x: x.repeat(5, 1)),
        ("constants", lambda x: x[:1]),
    ],
)
def test_a_damaged_state_is_refused(key, damage):
    policy = make_policy("mlp", memory_size=3)
    for i in range(4):
        push(policy, seed=i)
    state = policy.state_dict()
    state[f"frozen_critics.{key}"] = damage(state[f"frozen_critics.{key}"])
    obs = sample_obs(BOX, 6)
    other = make_policy("mlp", memory_size=3)
    push(other, seed=9)
    before = other.logit_sums(obs)
    with pytest.raises(ValueError, match="The saved stack is damaged"):
        other.load_state_dict(state)
    assert th.equal(other.logit_sums(obs), before)


@pytest.mark.parametrize("n_before", [1, 3, 12])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_push_happens_or_does_not(n_before, error, monkeypatch):
    """Whatever copy or allocation fails: the policy is the old or the new one, saves, loads and goes on."""

    def make():
        policy = make_policy("mlp", memory_size=3, average_window=0.6, average_size=4)
        for i in range(n_before):
            push(policy, seed=i)
        randomise(policy.critics, seed=99)
        return policy

    obs = sample_obs(BOX, 6)
    allowed = [make(), make()]
    allowed[1].push_critics(1.0, 0.1)
    allowed = [policy.logit_sums(obs, average=True) for policy in allowed]
    n_failed = 0
    for method in ("copy_", "clone", "new_empty"):
        for at in range(100):
            policy, count, original = make(), iter(range(10**6)), getattr(th.Tensor, method)

            def failing(*args, original=original, at=at, count=count, **kwargs):
                if next(count) == at:
                    if error is KeyboardInterrupt:
                        signal.raise_signal(signal.SIGINT)
                    elif inspect.stack()[1].function != "push":  # what cannot fail: copies into memory that is there
                        raise error
                return original(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(th.Tensor, method, failing)
                try:
                    policy.push_critics(1.0, 0.1)
                    failed = False
                except error:
                    failed = True
            n_failed += failed
            logits = policy.logit_sums(obs, average=True)
            assert any(th.equal(logits, x) for x in allowed)
            other = make_policy("mlp", memory_size=3, average_window=0.6, average_size=4)
            other.load_state_dict(policy.state_dict())
            assert th.equal(other.logit_sums(obs, average=True), logits)
            push(policy, seed=5)
            assert relative_error(policy.logit_sums(obs), slow_logit_sums(policy, obs)) < 1e-5
            if next(count) <= at:
                break
    assert n_failed > 0


def test_gradients_with_respect_to_observations():
    """On request, as finite differences say: for attribution and adversarial tests."""
    policy = make_policy("mlp", memory_size=3, net_arch=[8])
    for i in range(5):
        push(policy, seed=i)
    policy.to(th.float64)
    obs = sample_obs(BOX, 3).double().requires_grad_()
    assert th.autograd.gradcheck(lambda x: policy.frozen_critics(x).double(), obs, eps=1e-4, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("critic", ["additive", "joint"])
def test_other_ways_to_run_the_critics(critic):
    """torch.func differentiates them as autograd does, autocast runs them forwards and backwards."""
    policy = make_model(RandomObsEnv(action_space=spaces.MultiDiscrete([2, 3])), critic=critic).policy
    randomise(policy.critics, seed=0)
    obs, actions = th.rand(20, 4), th.randint(2, (20, 2))
    names, params = zip(*policy.critics.params.items(), strict=True)

    def loss(*values):
        policy.critics.params = dict(zip(names, values, strict=True))
        return policy.action_values(obs, actions).square().mean()

    value = loss(*params)
    expected = th.autograd.grad(value, params)
    actual = th.func.grad(loss, argnums=tuple(range(len(params))))(*params)
    for a, b in zip(actual, expected, strict=True):
        th.testing.assert_close(a, b)
    with th.autocast("cpu", dtype=th.bfloat16):
        approximate = loss(*params)
    th.testing.assert_close(approximate.float(), value, rtol=0.1, atol=0)
    for a, b in zip(th.autograd.grad(approximate, params), expected, strict=True):
        assert th.isfinite(a).all() and relative_error(a, b) < 0.2


def test_wrong_architecture_is_refused():
    policy, other = make_policy("mlp"), make_policy("tanh")
    push(policy, seed=0)
    with pytest.raises(RuntimeError, match=r"size mismatch|Unexpected key"):
        other.load_state_dict(policy.state_dict())


@pytest.mark.parametrize("n_pushed", [1, 5, 9])
def test_saved_stack_has_no_unused_rows(n_pushed):
    """While the blocks grow they have room for more entries, which is not saved."""
    policy = make_policy(memory_size=50)
    for _ in range(n_pushed):
        policy.push_critics(0.5, 0.05)
    size = sum(
        value.untyped_storage().nbytes()
        for value in policy.frozen_critics.state_dict().values()
        if isinstance(value, th.Tensor)
    )
    critics = sum(param.numel() * param.element_size() for param in policy.critics.parameters())
    numbers = 4 * (3 * n_pushed + n_pushed + 9)
    assert size == n_pushed * critics + numbers
