"""State-action critics and their main effects, held against ordinary networks and enumeration of all actions."""

import copy
import itertools

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import OneStateEnv, RandomObsEnv, make_model, members, randomise, relative_error, sample_obs
from stable_baselines3.common.envs import FakeImageEnv, IdentityEnvBox, IdentityEnvMultiDiscrete

from sb3_staq import CnnPolicy, MlpPolicy, MultiInputPolicy, StaQ
from sb3_staq.action_spaces import make_branches
from sb3_staq.main_effects import StateActionCritics, main_effects_loss, sample_actions, vary_one_branch
from sb3_staq.mirror_descent import log_policy

BOX = spaces.Box(-1, 1, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
DICT = spaces.Dict(img=IMAGE, vec=spaces.Box(-2, 2, (3,), np.float64), kind=spaces.Discrete(4))
ACTION_SPACES = {
    "multi_discrete": (spaces.MultiDiscrete([2, 4, 3]), {}),
    "multi_binary": (spaces.MultiBinary(3), {}),
    "discrete": (spaces.Discrete(5, start=-2), {}),
    "box_factored": (spaces.Box(-2, 1, (3,), np.float32), dict(action_bins=4)),
    "box_axis": (spaces.Box(-2, 1, (3,), np.float32), dict(action_grid="axis")),
}
ARCHITECTURES = {
    "mlp": (MlpPolicy, BOX, dict(net_arch=[16, 8])),
    "no_layer_norm": (MlpPolicy, BOX, dict(net_arch=[16, 8], layer_norm=False)),
    "linear": (MlpPolicy, BOX, dict(net_arch=[])),
    "one_critic": (MlpPolicy, BOX, dict(net_arch=[8], n_critics=1)),
    "image": (CnnPolicy, IMAGE, dict(net_arch=[8], features_extractor_kwargs=dict(features_dim=8))),
    "dict": (MultiInputPolicy, DICT, dict(net_arch=[8], features_extractor_kwargs=dict(cnn_output_dim=8))),
}


def make_policy(architecture="mlp", action_space="box_factored", **kwargs):
    policy_class, obs_space, policy_kwargs = ARCHITECTURES[architecture]
    space, action_kwargs = ACTION_SPACES[action_space]
    policy_kwargs = {"memory_size": 4, **action_kwargs, **policy_kwargs, **kwargs}
    th.manual_seed(0)
    policy = policy_class(obs_space, space, lr_schedule=lambda _: 1e-3, critic="joint", **policy_kwargs)
    randomise(policy.critics, seed=0)
    randomise(policy.critics_target, seed=1)
    randomise(policy.main_effects, seed=2)
    randomise(policy.main_effects_target, seed=3)
    return policy


def all_actions(policy):
    """Every combination of bins, shape (n_actions, number of branches), and the networks' input for each."""
    branches = policy.branches
    bins = th.tensor(list(itertools.product(*map(range, branches.sizes))))
    stored = branches.decode(bins)
    if branches.box_dim:
        return bins, stored
    one_hot = [th.eye(size)[bins[:, i]] for i, size in enumerate(branches.sizes)]
    return bins, th.cat(one_hot, dim=1)


def slow_values(net, obs, actions):
    """Q-values by an ordinary network, shape (batch, n_actions)."""
    features = net.features_extractor(obs)
    rows = [
        [net.q_net(th.cat([f, action]).unsqueeze(0)).squeeze() for action in of_state]
        for f, of_state in zip(features, actions, strict=True)
    ]
    return th.stack([th.stack(row) for row in rows])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("action_space", ["box_factored", "multi_discrete"])
def test_joint_critics_equal_networks_one_by_one(architecture, action_space):
    """Values and gradients."""
    policy = make_policy(architecture, action_space)
    obs = policy.preprocess(sample_obs(policy.observation_space, 3))
    actions = th.rand(3, 5, policy.branches.n_inputs)
    nets = members(policy.critics)
    assert len(nets) == policy.n_critics
    batched = policy.critics(obs, actions.flatten(0, 1), th.arange(3).repeat_interleave(5)).unflatten(1, (3, 5))
    assert relative_error(policy.critics(obs, actions[:, 0]).detach(), batched[:, :, 0].detach()) < 1e-5
    one_by_one = th.stack([slow_values(net, obs, actions) for net in nets])
    assert batched.shape == (policy.n_critics, 3, 5)
    assert batched.std() > 0.01
    assert relative_error(batched.detach(), one_by_one.detach()) < 1e-5
    batched.square().sum().backward()
    one_by_one.square().sum().backward()
    for name, param in policy.critics.net.named_parameters():
        expected = th.stack([net.get_parameter(name).grad for net in nets])
        assert relative_error(param.grad, expected) < 1e-4, name


@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_values_of_stored_actions(action_space):
    policy = make_policy(action_space=action_space)
    obs = sample_obs(policy.observation_space, 1)
    bins, inputs = all_actions(policy)
    stored = policy.branches.decode(bins)
    many = obs.expand(len(stored), -1)
    expected = th.stack([slow_values(net, obs, inputs.unsqueeze(0)).squeeze(0) for net in members(policy.critics)])
    assert expected.std() > 0.01
    assert relative_error(policy.action_values(many, stored).detach(), expected.detach()) < 1e-5


def test_critics_of_images_have_a_hidden_layer():
    """Without one, the values of actions would not depend on the state."""
    policy = StaQ("CnnPolicy", FakeImageEnv(discrete=False), buffer_size=1, device="cpu").policy
    assert isinstance(policy.critics, StateActionCritics)
    randomise(policy.critics, seed=0)
    obs = sample_obs(policy.observation_space, 2)
    low, high = (policy.action_values(obs, th.full((2, 5), value)) for value in (-1.0, 1.0))
    differences = high - low  # by critic and state
    assert not th.allclose(differences[:, 0], differences[:, 1], rtol=1e-3)


def test_joint_critics_learn():
    """The value of an episode of one step."""
    model = make_model(OneStateEnv(False, 3), critic="joint", gradient_steps=5, policy_update_interval=10**6)
    model.learn(150)
    values = model.policy.action_values(th.ones(3, 2), th.arange(3).unsqueeze(1)).detach()
    np.testing.assert_allclose(values, 1.0, atol=0.05)


@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_sweep_varies_one_branch(action_space):
    space, kwargs = ACTION_SPACES[action_space]
    branches = make_branches(space, **kwargs)
    n_branches = len(branches.sizes)
    bins = branches.uniform(4 * n_branches)
    varied, columns, valid = vary_one_branch(branches, bins)
    offsets = np.cumsum([0, *branches.sizes])
    first = offsets.tolist().index(columns[0, 0].item())
    for i in range(len(bins)):
        branch = (first + i // 2) % n_branches  # pairs take turns
        size = branches.sizes[branch]
        assert valid[i].tolist() == [True] * size + [False] * (max(branches.sizes) - size)
        assert columns[i, :size].tolist() == list(range(offsets[branch], offsets[branch + 1]))
        for option in range(size):
            expected = bins[i].clone()
            expected[branch] = option
            assert varied[i, option].tolist() == expected.tolist()
        # What is not valid can still be looked up
        assert (varied[i] < th.tensor(branches.sizes)).all()
        assert (columns[i] < branches.n_bins).all()


def test_small_batches_sweep_all_branches():
    """... in the course of time: which branch is the first one changes."""
    branches = make_branches(spaces.Box(-1, 1, (17,)), action_bins=3)
    th.manual_seed(0)
    first_columns = th.cat([vary_one_branch(branches, branches.uniform(4))[1][:, 0] for _ in range(100)])
    assert set(first_columns.tolist()) == set(range(0, 17 * 3, 3))


@pytest.mark.parametrize("sizes", [[2, 4], [3, 3]])
def test_samples_follow_the_policy(sizes):
    branches = make_branches(spaces.MultiDiscrete(sizes))
    th.manual_seed(0)
    log_pi = log_policy(2 * th.randn(1, 6), branches.sizes)
    n = 40_000
    bins = branches.sample(log_pi.expand(n, -1))
    frequencies = branches.one_hot(bins).mean(dim=0)
    # Five standard errors
    assert (frequencies - log_pi.exp()[0]).abs().max() < 5 * 0.5 / n**0.5
    # Independent branches
    both = th.stack([(bins == th.tensor(pair)).all(dim=1).float().mean() for pair in [(0, 1), (1, 2)]])
    product = th.stack([log_pi.exp()[0, a] * log_pi.exp()[0, sizes[0] + b] for a, b in [(0, 1), (1, 2)]])
    assert (both - product).abs().max() < 5 * 0.5 / n**0.5


@pytest.mark.parametrize("reduction", ["mean", "min"])
@pytest.mark.parametrize("action_space", ["multi_discrete", "box_factored", "discrete"])
def test_expected_q_and_main_effects_are_unbiased(action_space, reduction):
    """Against the sum over all joint actions, for a random policy at one state."""
    policy = make_policy(action_space=action_space, critic_reduction=reduction, n_critics=1)
    branches = policy.branches
    obs = sample_obs(policy.observation_space, 1)
    th.manual_seed(1)
    log_pi = log_policy(th.randn(1, branches.n_bins), branches.sizes)
    bins, inputs = all_actions(policy)
    (net,) = members(policy.critics_target)
    with th.no_grad():
        q_values = slow_values(net, obs, inputs.unsqueeze(0))[0]
    log_p = log_pi[0, branches.columns(bins)].sum(dim=1)
    expected = (log_p.exp() * q_values).sum()

    n_swept = 30_000 * len(branches.sizes)
    n = n_swept if len(branches.sizes) == 1 else 2 * n_swept
    many, log_pis = obs.expand(n, -1), log_pi.expand(n, -1)
    values, sweep = policy.expected_q(many, log_pis, sample_actions(policy.branches, log_pis))
    for part in (values, values[::2], values[1::2]):  # of many branches, every other one is swept
        assert (part.mean() - expected).abs() < 5 * part.std() / len(part) ** 0.5 + 1e-5
    assert len(sweep.q_values) == n_swept
    columns = branches.columns(bins)
    for column in range(branches.n_bins):
        here = (columns == column).any(dim=1)
        # E[Q | a_g] over the other branches
        effect = (log_p[here].softmax(dim=0) * q_values[here]).sum()
        samples = sweep.q_values[(sweep.columns == column) & sweep.valid]
        assert len(samples) == 30_000
        assert (samples.mean() - effect).abs() < 5 * samples.std() / len(samples) ** 0.5 + 1e-5
    if len(branches.sizes) == 1:  # then nothing is left to chance
        assert values.std() < 1e-5


@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_actions_of_a_batch_are_drawn_from_its_policy(action_space):
    """Those of several batches are drawn at once."""
    space, kwargs = ACTION_SPACES[action_space]
    model = make_model(RandomObsEnv(action_space=space), critic="joint", **kwargs).learn(100)
    batches = list(model.replay.batches(3, 50))
    assert len(batches) == 3
    assert not th.equal(batches[0].next_log_prob, batches[1].next_log_prob)
    for batch in batches:
        log_pi, drawn = batch.next_log_prob, batch.next_actions
        for row in range(50):
            columns = drawn.columns[row][drawn.valid[row]]
            assert th.equal(drawn.prob[row][drawn.valid[row]], log_pi[row, columns].exp())
            assert (drawn.prob[row][~drawn.valid[row]] == 0).all()
            # The drawn action is one of the varied ones, which differ in one branch only: in up to two components of
            # its one-hot code, or of an action of the axis grid
            same = (drawn.varied_inputs[row] == drawn.inputs[row]).all(dim=1) & drawn.valid[row]
            assert same.sum() == 1
            n_different = (drawn.varied_inputs[row][drawn.valid[row]] != drawn.inputs[row]).sum(dim=1)
            assert n_different.max() <= (1 if action_space == "box_factored" else 2)


@pytest.mark.parametrize("n", [7, 8])
def test_every_other_state_is_swept(n):
    """Not a part of the batch: those of HER are ordered, with the relabelled transitions at the end."""
    policy = make_policy(action_space="box_factored")
    obs = sample_obs(policy.observation_space, n)
    log_pi = log_policy(th.randn(n, policy.branches.n_bins), policy.branches.sizes)
    drawn = sample_actions(policy.branches, log_pi)
    values, sweep = policy.expected_q(obs, log_pi, drawn)
    assert th.equal(sweep.obs, obs[::2])
    with th.no_grad():
        nets = members(policy.critics_target)
        swept = th.stack([slow_values(net, obs[::2], drawn.varied_inputs[::2]) for net in nets])
        sampled = th.stack([slow_values(net, obs[1::2], drawn.inputs[1::2].unsqueeze(1)) for net in nets])
    assert relative_error(sweep.q_values, swept.mean(dim=0)) < 1e-5
    assert relative_error(values[::2], (drawn.prob[::2] * swept).sum(dim=2).mean(dim=0)) < 1e-5
    assert relative_error(values[1::2], sampled.squeeze(2).mean(dim=0)) < 1e-5


def test_minimum_is_of_expected_q():
    policy = make_policy(action_space="discrete", critic_reduction="min", n_critics=3)
    branches = policy.branches
    obs = sample_obs(policy.observation_space, 6)
    log_pi = log_policy(th.randn(6, branches.n_bins), branches.sizes)
    _, inputs = all_actions(policy)
    with th.no_grad():
        q_values = th.stack([slow_values(net, obs, inputs.expand(6, -1, -1)) for net in members(policy.critics_target)])
    expected = (log_pi.exp() * q_values).sum(dim=2).amin(dim=0)
    values, _ = policy.expected_q(obs, log_pi, sample_actions(policy.branches, log_pi))
    assert relative_error(values, expected) < 1e-5


@pytest.mark.parametrize("action_space", ["multi_discrete", "box_factored"])
def test_main_effects_loss(action_space):
    """It is the squared error of differences within a branch, and takes no notice of a branch's constant."""
    policy = make_policy(action_space=action_space)
    obs = sample_obs(policy.observation_space, 23)
    log_pi = log_policy(th.randn(23, policy.branches.n_bins), policy.branches.sizes)
    _, sweep = policy.expected_q(obs, log_pi, sample_actions(policy.branches, log_pi))
    (net,) = members(policy.main_effects)
    with th.no_grad():
        effects = net(obs[::2])
    errors = []
    for i in range(12):
        n = int(sweep.valid[i].sum())
        difference = effects[i, sweep.columns[i, :n]] - sweep.q_values[i, :n]
        errors += (difference - difference.mean()).square().tolist()
    assert main_effects_loss(policy.main_effects, sweep).item() == pytest.approx(np.mean(errors), rel=1e-4)
    shifted = sweep._replace(q_values=sweep.q_values + th.randn(12, 1))
    assert main_effects_loss(policy.main_effects, shifted).item() == pytest.approx(np.mean(errors), rel=1e-4)


def test_targets_are_polyak_averages():
    policy = make_policy()
    pairs = [(policy.critics, policy.critics_target), (policy.main_effects, policy.main_effects_target)]
    trained, averages = ([net.state_dict() for net in map(copy.deepcopy, nets)] for nets in zip(*pairs, strict=True))
    policy.update_targets(0.25)
    policy.average_main_effects(0.25)
    for (net, target), old, average in zip(pairs, trained, averages, strict=True):
        for name, value in target.state_dict().items():
            th.testing.assert_close(value, 0.25 * old[name] + 0.75 * average[name])
            assert th.equal(net.state_dict()[name], old[name])


def test_training_averages_the_main_effects_at_every_step():
    """By ``tau / target_update_interval``: as slowly as the targets, which follow only at some steps."""
    env = RandomObsEnv(action_space=spaces.MultiDiscrete([2, 3]))
    model = make_model(env, critic="joint", tau=0.4, target_update_interval=8, policy_update_interval=10**6)
    model.learn(22)
    main_effects, average = model.policy.main_effects, model.policy.main_effects_target
    for _ in range(3):
        before = copy.deepcopy(average.state_dict())
        model.train(1, 16)
        for name, value in average.state_dict().items():
            th.testing.assert_close(value, 0.05 * main_effects.state_dict()[name] + 0.95 * before[name])
            assert not th.equal(value, before[name])


def test_hard_target_copies_do_not_freeze_the_same_main_effects_again():
    model = make_model("Pendulum-v1", critic="joint", tau=1.0, target_update_interval=40, memory_size=10).learn(100)
    stack = model.policy.frozen_critics
    entries = {th.cat([param.flatten() for param in entry.parameters()]).numpy().tobytes() for entry in stack}
    assert len(entries) == len(stack) == 8


def test_update_pushes_the_average_of_the_main_effects():
    policy = make_policy(action_space="multi_discrete")
    obs = sample_obs(policy.observation_space, 5)
    (net,) = members(policy.main_effects_target)
    policy.push_critics(kl_coef=1.0, ent_coef=0.5)
    with th.no_grad():
        expected = net(obs) / 1.5 / (1 - (1 / 1.5) ** 4)
    assert relative_error(policy.logits(obs), expected) < 1e-5
    assert len(members(policy.frozen_critics[0])) == 1


@pytest.mark.parametrize("action_space", ACTION_SPACES)
@pytest.mark.parametrize("logit_cache", [True, False])
def test_training_fits_the_main_effects(action_space, logit_cache):
    """They explain more than half of the differences that the critics make within a branch."""
    space, kwargs = ACTION_SPACES[action_space]
    env = RandomObsEnv(action_space=space)
    model = make_model(env, critic="joint", logit_cache=logit_cache, gamma=0.5, **kwargs)
    model.learn(300)
    assert model._n_updates == 280
    assert len(model.policy.frozen_critics) == 4
    batch = model.replay_buffer.sample(200)
    log_pi = log_policy(model.policy.logits(batch.next_observations), model.policy.branches.sizes)
    _, sweep = model.policy.expected_q(batch.next_observations, log_pi, sample_actions(model.policy.branches, log_pi))
    loss = main_effects_loss(model.policy.main_effects, sweep).item()
    centred = sweep.valid * sweep.q_values
    centred = centred - sweep.valid * centred.sum(dim=1, keepdim=True) / sweep.valid.sum(dim=1, keepdim=True)
    assert loss < 0.5 * centred.square().sum().item() / sweep.valid.sum().item()


@pytest.mark.slow
@pytest.mark.parametrize("env", [IdentityEnvMultiDiscrete(4), IdentityEnvBox(eps=0.5)])
def test_identity_environments_are_solved(env):
    model = make_model(env, critic="joint", gamma=0.0, action_bins=5, buffer_size=3000, train_freq=2, gradient_steps=1)
    model.learn(3000)
    env = model.get_env()
    obs = env.reset()
    rewards = []
    for _ in range(100):
        actions, _ = model.predict(obs, deterministic=True)
        obs, reward, _, _ = env.step(actions)
        rewards += reward.tolist()
    assert np.mean(rewards) > 0.9


def test_save_and_load(tmp_path):
    model = make_model(RandomObsEnv(action_space=spaces.Box(-1, 1, (2,), np.float32)), critic="joint").learn(100)
    model.save(tmp_path / "x.zip")
    loaded = StaQ.load(tmp_path / "x.zip")
    obs = sample_obs(model.observation_space, 7)
    assert th.equal(model.policy.logits(obs), loaded.policy.logits(obs))
    for key, value in model.policy.state_dict().items():
        if isinstance(value, th.Tensor):
            assert th.equal(value, loaded.policy.state_dict()[key]), key
    for old, new in zip(model.policy.optimizer.param_groups, loaded.policy.optimizer.param_groups, strict=True):
        for a, b in zip(old["params"], new["params"], strict=True):
            states = model.policy.optimizer.state[a], loaded.policy.optimizer.state[b]
            assert th.equal(states[0]["exp_avg"], states[1]["exp_avg"])
    model.policy.save(tmp_path / "policy.pkl")
    assert th.equal(MlpPolicy.load(tmp_path / "policy.pkl").logits(obs), model.policy.logits(obs))
