"""Critics and ensembles: batched passes against ordinary networks one by one."""

import numpy as np
import pytest
import torch as th
from architectures import ARCHITECTURES, BOX, IMAGE, make_policy, push
from gymnasium import spaces
from helpers import RandomObsEnv, by_age, make_model, members, randomise, relative_error, sample_obs, slow_q_values
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.func import functional_call

from sb3_staq import CnnPolicy, MlpPolicy, kernels
from sb3_staq.q_networks import DuelingHead


@pytest.fixture(params=["AMD", "another maker"])
def processor(request, monkeypatch):
    """As on a processor of this maker, which decides how products are computed, with sizes for small networks."""
    monkeypatch.setattr(kernels, "_on_amd", lambda: request.param == "AMD")
    monkeypatch.setattr(kernels, "READ_AHEAD_BYTES", 2 * 32 * 32 * 4)  # two networks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ensemble_equals_networks_one_by_one(architecture, processor):
    """Values and gradients of the critics that the stack is made of."""
    policy = make_policy(architecture)
    critics = policy.additive_critics.requires_grad_(True)
    critics.eval()  # no dropout
    obs = policy.preprocess(sample_obs(policy.observation_space, 9))
    nets = members(critics)
    assert len(nets) == (1 if policy.critic == "joint" else policy.n_critics)

    batched = critics(obs)
    one_by_one = th.stack([net(obs) for net in nets])
    n_bins = policy.branches.n_bins
    assert batched.shape == (len(nets), 9, n_bins)
    assert batched.std() > 0.01
    assert relative_error(batched.detach(), one_by_one.detach()) < 1e-5
    th.testing.assert_close(critics.q_values(obs), batched.mean(0))

    target = th.linspace(-1, 1, 9 * n_bins).reshape(9, n_bins)
    ((batched - target) ** 2).sum().backward()
    ((one_by_one - target) ** 2).sum().backward()
    for name, param in critics.net.named_parameters():
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


ACTIONS = spaces.Box(-1, 1, (2,), np.float32)
SMALL_CNN = dict(features_extractor_kwargs=dict(features_dim=8))


@pytest.mark.parametrize(
    ("policy_class", "space", "kwargs", "main_effects", "critics"),
    [
        (
            MlpPolicy,
            spaces.Discrete(3),
            dict(net_arch=[8, 6], activation_fn=nn.Tanh),
            None,
            [8, nn.Tanh, 6, nn.Tanh, 3],
        ),
        (MlpPolicy, spaces.MultiDiscrete([2, 3]), dict(net_arch=[8]), None, [8, nn.ReLU, 6, DuelingHead]),
        (CnnPolicy, spaces.Discrete(3), SMALL_CNN, None, [3]),
        (
            MlpPolicy,
            ACTIONS,
            dict(critic="joint", net_arch=dict(pi=[7], qf=[8]), activation_fn=nn.Tanh),
            [7, nn.Tanh, 10],
            [8, nn.LayerNorm, nn.Tanh, 1],
        ),
        (
            MlpPolicy,
            ACTIONS,
            dict(critic="joint", net_arch=[8], layer_norm=False),
            [8, nn.ReLU, 10],
            [8, nn.ReLU, 1],
        ),
        (
            CnnPolicy,
            ACTIONS,
            dict(critic="joint", **SMALL_CNN),
            [10],
            [256, nn.LayerNorm, nn.ReLU, 256, nn.LayerNorm, nn.ReLU, 1],
        ),
    ],
)
def test_layers_after_the_features_extractor(policy_class, space, kwargs, main_effects, critics):
    """Their kinds; of linear ones, the number of outputs."""

    def layers(ensemble):
        return [layer.weight.shape[1] if isinstance(layer, nn.Linear) else type(layer) for layer in ensemble.net.q_net]

    policy = policy_class(IMAGE if policy_class is CnnPolicy else BOX, space, lambda _: 1e-3, **kwargs)
    assert layers(policy.critics) == critics
    assert (policy.main_effects and layers(policy.main_effects)) == main_effects


@pytest.mark.parametrize("critic", ["additive", "joint"])
def test_targets_start_as_copies(critic):
    policy = MlpPolicy(BOX, spaces.MultiDiscrete([2, 3]), lambda _: 1e-3, critic=critic, net_arch=[8])
    pairs = [(policy.critics, policy.critics_target)]
    if critic == "joint":
        pairs.append((policy.main_effects, policy.main_effects_target))
    for online, target in pairs:
        for param, copied in zip(online.parameters(), target.parameters(), strict=True):
            assert th.equal(param, copied) and param is not copied


@pytest.mark.parametrize("sizes", [[3], [2, 2], [2, 3, 4]], ids=str)
def test_dueling_head(sizes):
    """The mean over the bins of each branch is its share of the value; advantages differ as they came in."""
    x = th.randn(4, 6, sum(sizes) + 1, generator=th.Generator().manual_seed(0))
    terms = DuelingHead(sizes)(x)
    assert terms.shape == (4, 6, sum(sizes))
    start = 0
    for size in sizes:
        branch, advantages = terms[..., start : start + size], x[..., start : start + size]
        th.testing.assert_close(branch.mean(-1), x[..., -1] / len(sizes))
        th.testing.assert_close(branch - branch[..., :1], advantages - advantages[..., :1])
        start += size


def test_new_critics_start_at_zero():
    """The first policies are uniform whatever the observations."""
    policy = MlpPolicy(BOX, spaces.Discrete(3), lambda _: 1e-3, net_arch=[16])
    obs = sample_obs(BOX, 5)
    assert (policy.critics(obs) == 0).all()
    policy.push_critics(1.0, 0.1)
    assert (policy.logits(obs) == 0).all()
    first, second = policy.critics.net.q_net[0].weight.unbind()
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


class BatchNormExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 4)
        self.net = nn.BatchNorm1d(4)


class LazyExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 4)
        self.net = nn.LazyLinear(4)


class TiedExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 4)
        self.first = self.second = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("extractor", "message"),
    [
        (BatchNormExtractor, "buffers"),
        (TiedExtractor, "parameter under several names"),
        (LazyExtractor, "parameters without a shape"),
    ],
)
def test_extractors_that_a_stack_cannot_hold(extractor, message):
    """Are refused by name."""
    with pytest.raises(ValueError, match=rf"Invalid features_extractor_class={extractor.__name__}.*{message}"):
        MlpPolicy(BOX, spaces.Discrete(3), lambda _: 1e-3, features_extractor_class=extractor)


class Keeping(BaseFeaturesExtractor):
    """Keeps its last features, to look at them."""

    def __init__(self, observation_space, in_list):
        super().__init__(observation_space, 4)
        self.net, self.in_list = nn.Linear(4, 4), in_list

    def forward(self, obs):
        features = self.net(obs).relu()
        self.last = [features] if self.in_list else features
        return features


@pytest.mark.parametrize("in_list", [False, True])
def test_extractors_that_keep_tensors(in_list):
    """Are refused when the critics that act are to be copied, and the policy stays as it was."""
    policy_kwargs = dict(features_extractor_class=Keeping, features_extractor_kwargs=dict(in_list=in_list))
    model = make_model(RandomObsEnv(), policy_kwargs=policy_kwargs)
    with pytest.raises(ValueError, match=r"Invalid features_extractor_class=Keeping.*keeps no tensors"):
        model.learn(100)
    assert model.n_policy_updates == len(model.policy.frozen_critics) == 1
    assert model.predict(np.zeros(4))[0] in range(3)


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


def test_each_critic_drops_out_its_own_features():
    """Where all of them have the same parameters, they differ by their dropout masks."""
    policy = make_policy("extractor")
    for param in policy.critics.parameters():
        param.data[1:] = param.data[:1]
    obs = sample_obs(BOX, 8)
    first, second = policy.critics(obs)
    assert not th.equal(first, second)
    th.testing.assert_close(*policy.critics.eval()(obs))


@pytest.mark.parametrize("architecture", ["mlp", "branches", "layer_norm", "image"])
@pytest.mark.parametrize("average", [False, True])
def test_gradients_by_observations(architecture, average):
    """Of the logits of both policies, against finite differences of the sum in double precision."""
    policy = make_policy(architecture, eval_policy="average" if average else "last", normalize_images=False)
    for i in range(6):
        push(policy, seed=i, kl_coef=1.0 + i)
    x = sample_obs(policy.observation_space, 2).float()
    if architecture == "image":
        x = x / 255.0
    x = x.requires_grad_()
    generator = th.Generator().manual_seed(1)
    factors = th.randn(2, policy.branches.n_bins, generator=generator)
    (policy.logits(x) * factors).sum().backward()
    assert x.grad.abs().max() > 0
    assert all(param.grad is None for param in policy.parameters())

    stack = policy.frozen_critics
    weights = stack.weights.values
    assert stack.average_window * stack.n_updates < 1.5  # so the average is the newest entry, times the sum
    newest = members(stack.newest)

    def slow(obs):
        with th.no_grad():
            if average:
                sums = sum(weights) * th.stack([net.double()(obs) for net in newest]).mean(0)
            else:
                entries = zip(weights, by_age(policy), strict=True)
                sums = sum(weight * slow_q_values(entry, obs) for weight, entry in entries)
            return (stack.weights.scale * sums * factors.double()).sum().item()

    for _ in range(5):
        direction = th.randn(x.shape, generator=generator, dtype=th.float64)
        step = 1e-7 * direction  # so small that no unit of the networks crosses its kink
        difference = (slow(x.detach().double() + step) - slow(x.detach().double() - step)) / 2e-7
        assert (x.grad.double() * direction).sum().item() == pytest.approx(difference, rel=1e-3, abs=1e-3)


def test_gradients_by_a_part_of_a_dictionary():
    """Floats have gradients beside images and integers."""
    policy = make_policy("dict")
    push(policy, seed=0)
    obs = sample_obs(policy.observation_space, 3)
    obs["vec"] = obs["vec"].float().requires_grad_()
    policy.logits(obs).sum().backward()
    assert np.isfinite(obs["vec"].grad.numpy()).all() and obs["vec"].grad.abs().max() > 0
