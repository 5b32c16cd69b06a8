"""Acting: what predict(), evaluation and the training take their actions from, as every policy of SB3 is used."""

import copy
import io
import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit, TransformReward
from helpers import (
    SMALL,
    OneStateEnv,
    RandomObsEnv,
    grow,
    make_model,
    randomise,
    relative_error,
    sample_obs,
    slow_average,
    slow_log_policy,
    slow_logit_sums,
)
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_staq import MlpPolicy, StaQ


class NeverZero(MlpPolicy):
    """Never takes the first action."""

    def _predict(self, observation, deterministic=True):
        logits = self.logits(observation)
        return 1 + logits[:, 1:].argmax(dim=1, keepdim=True)


class AlwaysTwo(StaQ):
    def predict(self, observation, *args, **kwargs):
        return np.full(len(observation), 2), None


@pytest.mark.parametrize("logit_cache", [True, False])
def test_subclasses_that_act_in_their_own_way(logit_cache):
    """... do so in training, too, although the logit cache has logits of its own."""
    own_ways = dict(logit_cache=logit_cache, exploration_initial_eps=0.0, exploration_final_eps=0.0)
    model = make_model(RandomObsEnv(), NeverZero, **own_ways).learn(150)
    taken = model.replay_buffer.actions[model.learning_starts : 150]
    assert set(taken.ravel()) == {1, 2}
    arguments = {**SMALL, **own_ways, "policy_kwargs": dict(net_arch=[8])}
    model = AlwaysTwo("MlpPolicy", RandomObsEnv(), **arguments).learn(150)
    assert (model.replay_buffer.actions[model.learning_starts : 150] == 2).all()


# Predicting and acting


@pytest.mark.parametrize("kind", ["box", "dict", "discrete", "image"])
def test_shapes_of_predictions(kind):
    env = RandomObsEnv(kind, start=2)
    policy, kwargs = {
        "dict": ("MultiInputPolicy", {}),
        "image": ("CnnPolicy", dict(policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=8)))),
    }.get(kind, ("MlpPolicy", {}))
    model = make_model(env, policy, **kwargs)
    grow(model, 2)
    model.exploration_rate = 0.5
    single, _ = env.reset(seed=0)
    if kind == "dict":
        batch = {key: np.stack([value] * 6) for key, value in single.items()}
    else:
        batch = np.stack([single] * 6)
    for predict, deterministic in itertools.product((model.predict, model.policy.predict), (True, False)):
        action, state = predict(single, deterministic=deterministic)
        assert isinstance(action, np.ndarray) and action.shape == ()
        assert state is None
        assert env.action_space.contains(np.int64(action))
        actions, _ = predict(batch, deterministic=deterministic)
        assert isinstance(actions, np.ndarray)
        assert actions.shape == (6,)
        assert np.issubdtype(actions.dtype, np.integer)
        assert all(env.action_space.contains(action) for action in actions)
        if deterministic:
            assert (actions == action).all()


@pytest.mark.parametrize(
    "action_space",
    [spaces.MultiDiscrete([[2, 3], [4, 2]]), spaces.MultiBinary([2, 3]), spaces.Box(-2, 1, (2, 3), np.float32)],
    ids=str,
)
def test_shapes_of_actions_of_several_dimensions(action_space, tmp_path):
    """The policy gives them as the model does, also when it is saved and loaded alone."""
    model = make_model(RandomObsEnv(action_space=action_space)).learn(40)
    model.policy.save(tmp_path / "policy.pth")
    obs = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    expected, _ = model.predict(obs, deterministic=True)
    assert expected.shape == (6, *action_space.shape)
    assert all(action_space.contains(action.astype(action_space.dtype)) for action in expected)
    for policy in (model.policy, MlpPolicy.load(tmp_path / "policy.pth")):
        np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], expected)
        # The mean of a Box is a number, whose rounding depends on how many observations are evaluated at once
        np.testing.assert_allclose(policy.predict(obs[0], deterministic=True)[0], expected[0], rtol=1e-5, atol=1e-6)


def test_deterministic_prediction_is_the_most_probable_action():
    """Also with exploration; and vectorised or not, it is the arg max of the logits."""
    model = make_model(RandomObsEnv())
    grow(model, 3)
    model.exploration_rate = 1.0
    obs = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    expected = slow_logit_sums(model.policy, th.as_tensor(obs)).argmax(dim=1).numpy()
    assert len(set(expected)) > 1
    assert np.array_equal(model.predict(obs, deterministic=True)[0], expected)
    assert [int(model.predict(row, deterministic=True)[0]) for row in obs] == expected.tolist()


def assert_frequencies(actions, probabilities):
    """Within five standard deviations of the expected frequencies."""
    n = len(actions)
    frequencies = np.bincount(actions, minlength=len(probabilities)) / n
    probabilities = np.asarray(probabilities)
    assert (np.abs(frequencies - probabilities) <= 5 * np.sqrt(probabilities * (1 - probabilities) / n) + 1e-9).all()


@pytest.fixture(scope="module")
def one_state_model():
    """A policy that is neither uniform nor deterministic in the only state of its environment."""
    model = make_model(OneStateEnv(True, n_actions=3), learning_starts=0, gradient_steps=0)
    grow(model, 3)
    with th.no_grad():
        logits = model.policy.logits(th.ones(1, 2))[0]
        model.policy.frozen_critics.weights.scale *= 1.5 / (logits.max() - logits.min()).item()
    return model


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_behaviour_is_epsilon_softmax(one_state_model, epsilon):
    """The frequencies of predicted actions and of those taken while learning."""
    model = one_state_model
    logits = slow_logit_sums(model.policy, th.ones(1, 2))[0] * model.policy.frozen_critics.weights.scale
    softmax = logits.softmax(-1).numpy()
    assert 0.1 < softmax.min() < softmax.max() < 0.8
    expected = (1 - epsilon) * softmax + epsilon / 3
    model.set_random_seed(0)
    model.exploration_rate = epsilon
    actions, _ = model.predict(np.ones((20_000, 2), np.float32), deterministic=False)
    assert_frequencies(actions, expected)
    assert_frequencies([int(model.predict(np.ones(2, np.float32))[0]) for _ in range(1000)], expected)
    actions, _ = model.policy.predict(np.ones((20_000, 2), np.float32), deterministic=False)
    assert_frequencies(actions, softmax)  # the policy itself does not explore


@pytest.mark.parametrize(
    ("space", "grid"),
    [
        (spaces.MultiDiscrete([2, 3]), "factored"),
        (spaces.MultiBinary([2, 1]), "factored"),
        (spaces.Box(-1, 1, (1, 2), np.float32), "factored"),
        (spaces.Box(-1, 1, (1, 2), np.float32), "axis"),
        (spaces.Box(-1, 1, (1, 2), np.float32), "joint"),
    ],
    ids=str,
)
def test_components_explore_independently(space, grid):
    """Beside a policy that always takes the same action, each component differs as often as chance has it."""
    model = make_model(RandomObsEnv(action_space=space), action_grid=grid, action_bins=3)
    grow(model, 1)
    policy, epsilon = model.policy, 0.4
    policy.frozen_critics.weights.scale = 1e6
    obs = np.ones((20_000, 4), np.float32)
    usual = policy.predict(obs[:100])[0]
    assert (usual == usual[0]).all()
    model.exploration_rate = epsilon
    differs = (model.predict(obs)[0] != usual[0]).reshape(len(obs), -1)
    if grid == "factored":
        expected = [epsilon * (1 - 1 / size) for size in policy.branches.sizes]
        np.testing.assert_allclose(differs.mean(axis=0), expected, atol=0.02)
        np.testing.assert_allclose(differs.all(axis=1).mean(), np.prod(expected), atol=0.02)
    else:
        n_bins = policy.branches.n_bins
        np.testing.assert_allclose(differs.any(axis=1).mean(), epsilon * (1 - 1 / n_bins), atol=0.02)
        assert len(np.unique(model.predict(obs)[0], axis=0)) == n_bins


def test_a_new_model_does_not_explore_when_it_predicts():
    """For instance one that is trained offline only."""
    assert make_model(RandomObsEnv()).exploration_rate == 0.0


@pytest.mark.parametrize("truncates", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_behaviour_while_learning_is_epsilon_softmax(epsilon, truncates):
    """Also where the logits come from the cache: within episodes and at their beginnings."""

    class Episodes(OneStateEnv):
        def step(self, action):
            self.count = getattr(self, "count", 0) + 1
            obs, reward, terminated, truncated, info = super().step(action)
            ends = self.count % 5 == 0
            return obs, reward, terminated and ends, truncated and ends, info

    env = DummyVecEnv([lambda: Episodes(truncates, 3)] * 2)
    model = make_model(
        env,
        learning_starts=0,
        gradient_steps=0,
        buffer_size=4000,
        exploration_initial_eps=epsilon,
        exploration_final_eps=epsilon,
    )
    grow(model, 3)
    weights = model.policy.frozen_critics.weights
    logits = slow_logit_sums(model.policy, th.ones(1, 2))[0]
    weights.scale = 1.5 / (logits.max() - logits.min()).item()
    model.learn(4000)
    softmax = (weights.scale * logits).softmax(-1).numpy()
    assert_frequencies(model.replay_buffer.actions[:2000].ravel(), (1 - epsilon) * softmax + epsilon / 3)


def test_uniform_actions_before_learning_starts(one_state_model):
    model = make_model(OneStateEnv(True, n_actions=3), learning_starts=1000, buffer_size=1000)
    model.policy.load_state_dict(one_state_model.policy.state_dict())
    model.learn(1000)
    assert_frequencies(model.replay_buffer.actions.ravel(), [1 / 3] * 3)


@pytest.mark.parametrize("learning_starts", [0, 20])
def test_random_actions_end_where_learning_starts(learning_starts):
    """So greedy that the action is known from then on; several times, as a random action may be the same."""
    model = make_model(
        OneStateEnv(True, n_actions=3), learning_starts=learning_starts, gradient_steps=0, exploration_initial_eps=0.0,
        exploration_final_eps=0.0,
    )  # fmt: skip
    grow(model, 3)
    model.policy.frozen_critics.weights.scale = 1e6
    best = model.policy.logits(th.ones(1, 2)).argmax().item()
    taken = []
    for seed in range(20):
        model.set_random_seed(seed)
        model.replay_buffer.reset()
        model.learn(learning_starts + 1)
        taken.append(int(model.replay_buffer.actions[learning_starts, 0, 0]))
    assert taken == [best] * 20


def test_exploration_schedule():
    """Linear over ``exploration_fraction`` of the training, then constant; logged under SB3's name."""

    class Watch(BaseCallback):
        rates = ()

        def _on_step(self):
            self.rates = (*self.rates, self.model.exploration_rate)
            return True

    callback = Watch()
    model = make_model(exploration_initial_eps=0.8, exploration_final_eps=0.2, exploration_fraction=0.5)
    model.learn(101, callback=callback, log_interval=None)
    expected = [max(0.2, 0.8 - 0.6 * (step / 101) / 0.5) for step in range(1, 101)]
    np.testing.assert_allclose(callback.rates[1:], expected, atol=1e-9)
    assert model.logger.name_to_value["rollout/exploration_rate"] == pytest.approx(0.2)


# As every policy of SB3


LIST_SPACES = [spaces.Discrete(3, start=1), spaces.MultiDiscrete([2, 3]), spaces.Box(-2, 1, (2,), np.float32)]


@pytest.mark.parametrize("kind", ["box", "dict"])
@pytest.mark.parametrize("action_space", LIST_SPACES, ids=lambda space: type(space).__name__)
def test_lists_are_observations(action_space, kind):
    """One or several as (nested) lists, of a Dict as values, give the actions of the same arrays."""
    env = RandomObsEnv(kind, action_space=action_space)
    model = make_model(env, "MultiInputPolicy" if kind == "dict" else "MlpPolicy")
    grow(model, 3)
    model.exploration_rate = 0.5
    several = {key: x.numpy() for key, x in sample_obs(env.observation_space, 5).items()} if kind == "dict" else None
    if several is not None:
        several["b"] = several["b"].ravel()
        several_lists = {key: x.tolist() for key, x in several.items()}
        one, one_list = {key: x[0] for key, x in several.items()}, {key: x[0] for key, x in several_lists.items()}
    else:
        several = sample_obs(env.observation_space, 5).numpy()
        several_lists, one, one_list = several.tolist(), several[0], several[0].tolist()
    for array, as_list in [(one, one_list), (several, several_lists)]:
        for predict, deterministic in itertools.product((model.predict, model.policy.predict), (True, False)):
            actions = []
            for obs in (array, as_list):
                model.set_random_seed(3)
                actions.append(predict(obs, deterministic=deterministic)[0])
            assert actions[0].shape == actions[1].shape == (() if array is one else (5,)) + action_space.shape
            assert np.array_equal(*actions)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e300])
@pytest.mark.parametrize("kind", ["box", "dict"])
def test_observations_that_are_not_finite_are_refused(kind, value):
    """... by name and place, whatever would be done with them: the mean of NaNs, or always the first bin."""
    env = RandomObsEnv(kind, action_space=spaces.Box(-1, 1, (2,), np.float32))
    model = make_model(env, "MultiInputPolicy" if kind == "dict" else "MlpPolicy")
    grow(model, 2)
    batch = sample_obs(env.observation_space, 3)
    if kind == "dict":
        batch, where = {key: x.numpy().astype(np.float64) for key, x in batch.items()}, r"\['a'\]\[2\]\[1\]"
        batch["a"][2, 1] = value
    else:
        batch, where = batch.numpy().astype(np.float64), r"\[2\]\[1\]"
        batch[2, 1] = value
    for predict, deterministic in itertools.product((model.predict, model.policy.predict), (True, False)):
        with pytest.raises(
            ValueError, match=rf"Invalid observation: .*got observation{where} = {re.escape(str(value))}$"
        ):
            predict(batch, deterministic=deterministic)


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("in_dict", [False, True])
def test_lists_are_images(in_dict, channel_last):
    shape = (36, 36, 1) if channel_last else (1, 36, 36)
    image = spaces.Box(0, 255, shape, np.uint8)
    env = RandomObsEnv(action_space=spaces.Box(-1, 1, (2,), np.float32))
    env.observation_space = spaces.Dict(image=image) if in_dict else image
    kwargs = dict(features_extractor_kwargs={"cnn_output_dim" if in_dict else "features_dim": 8})
    model = make_model(env, "MultiInputPolicy" if in_dict else "CnnPolicy", (8,), kwargs)
    grow(model, 3, ent_coef=30.0)  # no action is certain: their means differ
    several = np.stack([image.sample() for _ in range(20)])
    actions = []
    for obs in (several, several.tolist(), several[0].tolist()):
        actions.append(model.predict({"image": obs} if in_dict else obs, deterministic=True)[0])
    assert actions[0].std(axis=0).min() > 1e-3
    np.testing.assert_allclose(actions[1], actions[0], atol=1e-5)
    np.testing.assert_allclose(actions[2], actions[0][0], atol=1e-5)


class DropoutExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 16)
        self.net = nn.Sequential(nn.Linear(observation_space.shape[0], 16), nn.Tanh(), nn.Dropout(0.5))

    def forward(self, obs):
        return self.net(obs)


@pytest.mark.parametrize("critic", ["additive", "joint"])
@pytest.mark.parametrize("mode", [True, False])
def test_modes_change_nothing(mode, critic):
    """With dropout: the training goes on as if there had been no call, and the policy is never random."""
    parameters = []
    for called in (False, True):
        extractor = dict(features_extractor_class=DropoutExtractor)
        model = make_model(RandomObsEnv(), critic=critic, policy_kwargs=extractor).learn(60)
        if called:
            model.policy.set_training_mode(not mode)
            model.policy.train() if mode else model.policy.eval()
            assert model.policy.training == mode
            obs = th.ones(4, 4)
            assert th.equal(model.policy.logits(obs), model.policy.logits(obs))
            assert relative_error(model.policy.logit_sums(obs), slow_logit_sums(model.policy, obs)) < 1e-5
        model.learn(40, reset_num_timesteps=False)
        parameters.append(model.policy.parameters_to_vector())
    assert np.array_equal(*parameters)


@pytest.mark.parametrize("logit_cache", [True, False])
@pytest.mark.parametrize("critic", ["additive", "joint"])
def test_training_under_autocast(critic, logit_cache):
    """Losses are close to those of full precision; parameters stay floats, the policy keeps its full precision."""
    losses = []
    for enabled in (False, True):
        env = RandomObsEnv(action_space=spaces.Box(-1, 1, (2,), np.float32))
        model = make_model(env, critic=critic, logit_cache=logit_cache).learn(60)
        model.set_random_seed(1)
        with th.autocast("cpu", dtype=th.bfloat16, enabled=enabled):
            model.train(12, 32)
        assert all(th.isfinite(param).all() and param.dtype == th.float32 for param in model.policy.parameters())
        losses.append(model.logger.name_to_value["train/critic_loss"])
        obs = sample_obs(env.observation_space, 20)
        with th.autocast("cpu", dtype=th.bfloat16, enabled=enabled):
            sums = model.policy.logit_sums(obs)
        assert relative_error(sums, slow_logit_sums(model.policy, obs)) < 1e-5
        states = model.replay.sample(64).next_observations  # remembered, if anything is
        assert relative_error(model.replay.logit_sums(states), slow_logit_sums(model.policy, states)) < 1e-4
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("critic", ["additive", "joint"])
def test_state_dict_holds_tensors_that_restore_everything(critic):
    """... in a model of another size, too: set_parameters with what a user has copied gives bitwise equal logits."""
    model = make_model(RandomObsEnv(), critic=critic, memory_size=3, average_window=1.0).learn(120)
    state = {key: value.cpu().clone() for key, value in model.policy.state_dict().items()}
    assert all(isinstance(value, th.Tensor) for value in state.values())
    file = io.BytesIO()
    th.save(state, file)
    file.seek(0)
    state = th.load(file, weights_only=True)
    new = make_model(RandomObsEnv(), critic=critic, memory_size=3, average_window=1.0, seed=1)
    optimizer = model.policy.optimizer.state_dict()
    new.set_parameters({"policy": state, "policy.optimizer": optimizer}, exact_match=True)
    obs = sample_obs(model.observation_space, 20)
    for weighting in ("last", "average"):
        assert th.equal(new.policy.logit_sums(obs, weighting), model.policy.logit_sums(obs, weighting))
    assert not th.equal(model.policy.logit_sums(obs), model.policy.logit_sums(obs, "average"))
    assert th.equal(new.policy.logits(obs), model.policy.logits(obs))
    assert vars(new.policy.frozen_critics.weights) == vars(model.policy.frozen_critics.weights)


@pytest.mark.parametrize("eval_policy", ["average", "last"])
@pytest.mark.parametrize("critic", ["additive", "joint"])
def test_gradients_with_respect_to_observations(critic, eval_policy):
    """Those of the logits, as attributions need them, against differences of networks one by one."""
    kwargs = dict(policy_kwargs=dict(activation_fn=nn.Tanh), eval_policy=eval_policy)
    model = make_model(RandomObsEnv(), critic=critic, **kwargs).learn(100)
    policy, obs = model.policy, sample_obs(model.observation_space, 5)
    with th.inference_mode():
        policy.logits(obs)
    obs.requires_grad_(True)
    (gradients,) = th.autograd.grad(policy.logits(obs)[:, 1].sum(), obs)
    with th.no_grad():
        weights = policy.frozen_critics.weights
        scale = weights.scale * (weights.total if eval_policy == "average" else 1.0)
        slow = slow_average if eval_policy == "average" else slow_logit_sums
        for i in range(4):
            step = 1e-3 * th.eye(4, dtype=th.float64)[i]
            higher, lower = (slow(policy, x) for x in (obs + step, obs - step))
            expected = scale * (higher - lower)[:, 1] / 2e-3
            assert expected.abs().max() > 1e-2
            np.testing.assert_allclose(gradients[:, i], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_compiled_policy(env):
    """Training goes on with it, policy updates included, as with the policy that is not compiled."""
    models = []
    for compiled in (False, True):
        model = make_model(env, train_freq=8, gradient_steps=2, policy_update_interval=40, logit_cache=True).learn(100)
        if compiled:
            model.policy = th.compile(model.policy, backend="eager")
        models.append(model.learn(100, reset_num_timesteps=False))
    assert models[0].n_policy_updates == models[1].n_policy_updates == 4
    first, second = (np.concatenate([x.detach().ravel() for x in model.policy.parameters()]) for model in models)
    np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-4)
    batch = models[1].replay.sample(64)
    sums = models[1].replay.logit_sums(batch.next_observations)
    assert relative_error(sums, slow_logit_sums(models[1].policy, batch.next_observations)) < 1e-4


# Two weightings of one stack: the last policy collects, the average is delivered

EVAL_CASES = {
    "discrete": dict(action_space=spaces.Discrete(4, start=2)),
    "discrete_joint": dict(action_space=spaces.Discrete(4, start=2), critic="joint"),
    "multi_discrete": dict(action_space=spaces.MultiDiscrete([2, 4])),
    "multi_binary_joint": dict(action_space=spaces.MultiBinary(3), critic="joint"),
    "box": dict(action_space=spaces.Box(-3, 1, (2,), np.float32), action_bins=4),
    "box_joint": dict(action_space=spaces.Box(-3, 1, (2,), np.float32), action_bins=4, critic="joint"),
    "box_axis": dict(action_space=spaces.Box(-3, 1, (2,), np.float32), action_grid="axis"),
}


def two_policies(n_envs=1, env_class=RandomObsEnv, eval_policy="average", action_space=None, **kwargs):
    """A model whose last policy is one critic, and whose average is another policy, neither of them sharp."""
    env = DummyVecEnv([lambda: env_class(action_space=action_space) for _ in range(n_envs)])
    arguments = dict(memory_size=1, average_window=1.0, exploration_initial_eps=0.0, exploration_final_eps=0.0)
    model = make_model(env, eval_policy=eval_policy, **arguments, **kwargs)
    for seed in range(4):
        randomise(model.policy.additive_critics, seed)
        model.policy.push_critics(1.0, 0.1)
    weights = model.policy.frozen_critics.weights
    sums = slow_logit_sums(model.policy, sample_obs(env.observation_space, 50))
    weights.scale = 1.5 / (sums - sums.mean(1, keepdim=True)).std().item()
    return model


def slow_log_probs(model, obs):
    """log pi of the last policy and of the average, network by network in double precision."""
    policy, weights = model.policy, model.policy.frozen_critics.weights
    last = slow_log_policy(policy, weights.scale * slow_logit_sums(policy, obs))
    average = slow_log_policy(policy, weights.scale * sum(weights.values) * slow_average(policy, obs))
    assert (last - average).abs().max() > 0.5
    return {"last": last, "average": average}


def columns_of(model, stored):
    """The columns of the bins of stored actions, shape (n, number of branches)."""
    space = model.action_space
    if isinstance(space, spaces.Discrete):
        return stored - space.start
    if isinstance(space, spaces.MultiDiscrete):
        return stored + np.array([0, 2])
    if isinstance(space, spaces.MultiBinary):
        return stored + np.array([0, 2, 4])
    if model.action_grid == "axis":
        listed = np.array([[0, 0], [-1, 0], [0, -1], [1, 0], [0, 1]])
        return np.abs(stored[:, None] - listed).sum(2).argmin(1)[:, None]
    return np.rint((stored + 1) * 3 / 2) + np.array([0, 4])


def largest_deviation(columns, log_prob):
    """Of the frequency of a bin from its mean probability, in standard deviations."""
    prob = log_prob.exp().numpy()
    taken = np.zeros_like(prob)
    np.put_along_axis(taken, columns.astype(int), 1.0, axis=1)
    variance = (prob * (1 - prob)).sum(0)
    return np.abs((taken - prob).sum(0) / np.sqrt(variance)).max()


@pytest.mark.parametrize("case", EVAL_CASES)
def test_average_is_delivered_and_last_policy_collects(case):
    """Sampled and deterministic predictions against one policy, the actions of learn() against the other."""
    model = two_policies(n_envs=4, learning_starts=0, gradient_steps=0, buffer_size=4000, **EVAL_CASES[case])
    model.learn(4000)
    obs = th.as_tensor(model.replay_buffer.observations).flatten(0, 1)
    stored = model.replay_buffer.actions.reshape(len(obs), -1)
    log_probs = slow_log_probs(model, obs)
    columns = columns_of(model, stored)
    assert largest_deviation(columns, log_probs["last"]) < 5
    assert largest_deviation(columns, log_probs["average"]) > 5

    deterministic = {}
    for choice in ("average", "last"):
        model.eval_policy = choice
        model.set_random_seed(1)
        actions = model.predict(obs.numpy())[0].reshape(len(obs), -1)
        if isinstance(model.action_space, spaces.Box):
            actions = (actions + 3) / 2 - 1  # bounds -3 and 1
        assert largest_deviation(columns_of(model, actions), log_probs[choice]) < 5
        distribution = model.policy.get_distribution(obs).distribution
        parts = distribution if isinstance(distribution, list) else [distribution]
        th.testing.assert_close(
            th.cat([part.logits for part in parts], dim=1).double(), log_probs[choice], rtol=1e-4, atol=1e-4
        )
        deterministic[choice] = model.predict(obs.numpy(), deterministic=True)[0]
        if not isinstance(model.action_space, spaces.Box) or model.action_grid == "axis":
            modes = columns_of(
                model,
                model.policy.scale_action(deterministic[choice]).reshape(len(obs), -1)
                if isinstance(model.action_space, spaces.Box)
                else deterministic[choice].reshape(len(obs), -1),
            )
            best = np.take_along_axis(log_probs[choice].numpy(), modes.astype(int), axis=1).sum(1)
            assert np.allclose(
                best, sum(b.max(1).values for b in log_probs[choice].split(model.policy.branches.sizes, 1))
            )
    assert not np.array_equal(deterministic["average"], deterministic["last"])


class WatchedEnv(RandomObsEnv):
    """Notes where its actions were taken."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def step(self, action):
        self.seen.append(np.array(self._last))
        return super().step(action)


@pytest.mark.parametrize("choice", ["average", "last"])
def test_evaluation_uses_the_policy_that_is_chosen(choice):
    """By evaluate_policy, of the model or its policy, and by EvalCallback in a training that collects by the last."""
    model = two_policies(eval_policy=choice, learning_starts=0, gradient_steps=0)
    for use in ("model", "policy", "callback"):
        watched = WatchedEnv()
        env = DummyVecEnv([partial(Monitor, watched)])
        if use == "callback":
            model.learn(40, callback=EvalCallback(env, n_eval_episodes=10, eval_freq=20, verbose=0))
        else:
            evaluate_policy(model if use == "model" else model.policy, env, n_eval_episodes=10)
        best = {
            name: x.argmax(1).tolist() for name, x in slow_log_probs(model, th.tensor(np.array(watched.seen))).items()
        }
        assert len(watched.actions) >= 20
        assert watched.actions == best[choice] != best["last" if choice == "average" else "average"]


@pytest.mark.parametrize("critic", ["additive", "joint"])
@pytest.mark.parametrize("choice", ["average", "last"])
def test_choice_of_the_policy_is_saved_and_can_be_changed(choice, critic, tmp_path):
    """By the argument, at load, and at any time on the model or its policy."""
    other = "last" if choice == "average" else "average"
    model = two_policies(eval_policy=choice, critic=critic)
    obs = sample_obs(model.observation_space, 20)
    expected = slow_log_probs(model, obs)

    def assert_delivers(policy, choice):
        th.testing.assert_close(
            slow_log_policy(policy, policy.logits(obs).double()), expected[choice], rtol=1e-4, atol=1e-4
        )

    assert_delivers(model.policy, choice)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    assert_delivers(StaQ.load(tmp_path / "model").policy, choice)
    assert_delivers(StaQ.load(tmp_path / "model", eval_policy=other).policy, other)
    assert_delivers(MlpPolicy.load(tmp_path / "policy"), choice)

    loaded = StaQ.load(tmp_path / "model")
    loaded.eval_policy = other
    assert_delivers(loaded.policy, other)
    loaded.policy.eval_policy = choice
    assert loaded.eval_policy == choice
    loaded.policy.eval_policy = other
    loaded.save(tmp_path / "changed")
    assert StaQ.load(tmp_path / "changed").eval_policy == other
    assert_delivers(StaQ.load(tmp_path / "changed").policy, other)
    loaded.policy.eval_policy = choice
    loaded.save(tmp_path / "changed")
    assert StaQ.load(tmp_path / "changed").eval_policy == choice
    with pytest.raises(ValueError, match=r"Invalid eval_policy='mean': expected 'average' or 'best' or 'last'"):
        loaded.eval_policy = "mean"
    with pytest.raises(ValueError, match=r"Invalid eval_policy='mean': expected 'average' or 'best' or 'last'"):
        loaded.policy.eval_policy = "mean"
    with pytest.raises(ValueError, match=r"Invalid eval_policy='mean': expected 'average' or 'best' or 'last'"):
        StaQ.load(tmp_path / "model", eval_policy="mean")


@pytest.mark.parametrize(
    ("share", "by_average"),
    [
        (0.0, [0.0, 0.0, 0.0, 0.0]),
        (0.3, [1.0, 0.2, 0.0, 0.0]),
        (0.5, [1.0, 1.0, 0.0, 0.0]),
        (0.7, [1.0, 1.0, 0.8, 0.0]),
        (0.5, [0.5]),
        (1.0, [1.0] * 4),
    ],
)
def test_a_share_of_the_environments_collects_with_the_average(share, by_average):
    """The first greedily. Frequencies of the actions that each environment got, in its only state."""
    env = DummyVecEnv([lambda: OneStateEnv(True, n_actions=3)] * len(by_average))
    model = make_model(
        env, learning_starts=0, gradient_steps=0, buffer_size=8000, average_share=share, average_window=1.0,
        memory_size=2, exploration_initial_eps=0.0, exploration_final_eps=0.0,
    )  # fmt: skip
    grow(model, 6)
    stack, obs = model.policy.frozen_critics, th.ones(1, 2)
    logits = [slow_logit_sums(model.policy, obs)[0], sum(stack.weights.values) * slow_average(model.policy, obs)[0]]
    stack.weights.scale = 2.0 / max((x.max() - x.min()).item() for x in logits)
    last, average = ((stack.weights.scale * x).softmax(-1).numpy() for x in logits)
    assert np.abs(last - average).max() > 0.1
    model.learn(8000)
    actions = model.replay_buffer.actions[:2000, :, 0]
    assert len(actions) == 2000
    for i, part in enumerate(by_average):
        frequencies = np.bincount(actions[:, i], minlength=3) / 2000
        by_share = np.eye(3)[average.argmax()] if i == 0 else average
        np.testing.assert_allclose(frequencies, part * by_share + (1 - part) * last, atol=0.05)


def test_the_average_explores_but_where_it_is_tried():
    """Each environment acts by an average that always takes the same action; the first is greedy."""
    env = DummyVecEnv([lambda: OneStateEnv(True, n_actions=3)] * 4)
    model = make_model(
        env, average_share=1.0, average_window=1.0, learning_starts=0, gradient_steps=0, buffer_size=1000,
        exploration_initial_eps=1.0, exploration_final_eps=1.0,
    )  # fmt: skip
    grow(model, 3)
    model.policy.frozen_critics.weights.scale = 1e6
    model.learn(400)
    assert [len(np.unique(model.replay_buffer.actions[1:100, i])) for i in range(4)] == [1, 3, 3, 3]


def test_rounding_of_the_share():
    """0.58 * 50 is a bit less than 29."""
    model = make_model(DummyVecEnv([RandomObsEnv] * 50), average_share=0.58)
    assert model._average_envs == (29, 0.0)


def test_trials_act_by_the_candidate():
    """Greedily, and not by the average of the moment, which changes during the trial."""
    model = make_model(RandomObsEnv(), average_share=1.0, average_window=1.0, learning_starts=0)
    obs = sample_obs(model.observation_space, 30)
    grow(model, 6)
    model.policy.frozen_critics.propose(accept=False)
    candidate = slow_average(model.policy, obs).argmax(dim=1).tolist()
    grow(model, 6, seed=50)
    assert candidate != slow_average(model.policy, obs).argmax(dim=1).tolist()
    taken = []
    for row in obs.numpy():
        model._last_obs = row[None]
        taken.append(model._sample_action(0)[0].item())
    assert taken == candidate


@pytest.mark.parametrize(
    ("n", "ahead", "judged", "accepted"),
    [
        (8, 0.80, True, True),
        (8, 0.70, False, False),  # two standard errors are 0.756
        (20, 0.01, True, True),
        (19, 0.01, False, False),
        (4, 0.00, True, False),
        (4, -0.01, True, False),
    ],
)
def test_when_a_candidate_is_judged(n, ahead, judged, accepted, monkeypatch):
    """Returns of +1 and -1 around a mean: ahead by two standard errors, or for 20 episodes; or not ahead at all."""
    model, proposed = make_model(RandomObsEnv(), average_share=1.0), []
    stack = model.policy.frozen_critics
    stack.marked["candidate"] = (1, 1.0)
    monkeypatch.setattr(stack, "propose", lambda accept: proposed.append(accept))
    model._best_return = 10.0
    spread = (-1.0) ** np.arange(n)
    spread -= spread.mean()
    model._trial_returns = list(10.0 + ahead + spread)
    model._judge()
    assert proposed == [accepted] * judged
    assert model._best_return == pytest.approx(10.0 + max(0.0, ahead) * accepted)
    if judged:  # the spread of earlier trials counts less and less
        assert model._squares == pytest.approx(0.9 * (spread**2).sum())
        assert model._freedom == pytest.approx(0.9 * (n - 1))
        assert model._trial_returns == []
    else:
        assert model._squares == model._freedom == 0.0 and len(model._trial_returns) == n


class RisingAndFalling(RandomObsEnv):
    """Episodes of three to five steps, whose returns rise, fall, and rise again, less high, with noise."""

    n_episodes = 0

    def reset(self, *, seed=None, options=None):
        self.n_episodes += 1
        return super().reset(seed=seed, options=options)

    def step(self, action):
        obs, *_ = super().step(action)
        trend = 20 * np.sin(self.n_episodes / 25) / (1 + self.n_episodes / 100)
        reward = trend + 5 * np.random.default_rng(self.n_episodes).normal()
        return obs, reward, self.steps >= 3 + self.n_episodes % 3, False, {}


class Watch(BaseCallback):
    """
    Notes each episode of the average as (environment, first step, last step, return), and the average at each step.

    Reads the rewards, not the Monitor. ``_on_step`` comes before the step is stored.
    """

    def __init__(self, share, obs):
        super().__init__()
        self.share, self.obs, self.episodes, self.averages, self.updates = share, obs, [], {}, {}

    def _on_training_start(self):
        self.running = [(0, 0.0)] * self.model.n_envs

    def _on_step(self):
        model, step = self.model, self.model.num_timesteps
        self.averages[step] = model.policy.log_prob(model.policy.logit_sums(self.obs, "average"))
        self.updates[step] = model.n_policy_updates
        n_average = self.share * model.n_envs
        for i, (reward, done) in enumerate(zip(self.locals["rewards"], self.locals["dones"], strict=True)):
            began, total = self.running[i]
            self.running[i] = (began, total + reward) if not done else (step, 0.0)
            tries = i + 1 <= n_average or (i < n_average and model._average_turn)
            if done and tries and step >= model.learning_starts:
                self.episodes.append((i, began, step, total + reward))
        return True

    def best(self):
        """When the best average was taken, and its mean return."""
        trial, taken, returns, best = self.model.learning_starts, None, [], (None, -np.inf)
        trials = []  # earlier ones
        for i, began, step, value in self.episodes:
            if i > 0 or began < trial:
                continue
            returns.append(value)
            is_best = self.updates.get(taken, 0) > 0 and np.mean(returns) > best[1]  # no average of nothing
            if step - (taken or 0) < 0.05 * step:
                continue
            # Ahead by two standard errors, with the variance within the trials pooled, the older the less
            weighted = [(0.9**age, x) for age, x in enumerate([returns, *reversed(trials)])]
            freedom = sum(weight * (len(x) - 1) for weight, x in weighted)
            squares = sum(weight * np.sum((x - np.mean(x)) ** 2) for weight, x in weighted)
            error = np.sqrt(squares / freedom / len(returns)) if freedom > 0 else np.inf
            if is_best and len(returns) < 20 and np.mean(returns) - best[1] < 2 * error:
                continue
            if is_best:
                best = taken, np.mean(returns)
            trials.append(returns)
            trial, taken, returns = step, step, []
        return best


@pytest.mark.parametrize(("n_envs", "share"), [(1, 0.5), (1, 1.0), (2, 0.5), (3, 0.5), (4, 0.25)])
def test_best_average(n_envs, share, tmp_path):
    """It is the average of all that were tried whose own whole episodes returned most."""
    env = make_vec_env(RisingAndFalling, n_envs)
    model = make_model(
        env, average_share=share, eval_policy="best", learning_starts=20, gradient_steps=1, policy_update_interval=12,
        average_window=0.3, memory_size=3, train_freq=12 // n_envs, net_arch=(4,), batch_size=4,
    )  # fmt: skip
    watch = Watch(share, sample_obs(env.observation_space, 20))
    model.learn(1200, callback=watch)
    step, mean = watch.best()
    assert 20 < step < 1000 and model._best_return == pytest.approx(mean)
    assert model.policy.frozen_critics.marked["best"][0] < 0.9 * model.n_policy_updates
    model.save(tmp_path / "model")
    for policy in (model.policy, StaQ.load(tmp_path / "model").policy, copy.deepcopy(model.policy)):
        actual = policy.get_distribution(watch.obs).distribution.logits
        th.testing.assert_close(actual, watch.averages[step], rtol=1e-4, atol=1e-4)

    # In another task, what comes is judged by itself
    model.learn(100)
    assert model._best_return == pytest.approx(mean)
    model.set_env(make_vec_env(lambda: TransformReward(RisingAndFalling(), lambda reward: reward - 1000), n_envs))
    model.learn(300, reset_num_timesteps=False)
    assert -np.inf < model._best_return < mean - 1000


def test_returns_of_trials_are_logged():
    model = make_model(DummyVecEnv([lambda: Monitor(RandomObsEnv())]), average_share=1.0, learning_starts=0)
    model.learn(200, log_interval=None)
    logged = model.logger.name_to_value
    assert logged["rollout/best_ep_rew_mean"] == model._best_return > -np.inf
    assert 0 <= logged["rollout/candidate_ep_rew_mean"] <= 8  # at most 1 in each of at most 8 steps


class OfLength(RandomObsEnv):
    """Episodes of so many steps, with 1 as each reward."""

    def __init__(self, n_steps):
        super().__init__(ep_length=n_steps)

    def step(self, action):
        obs, *_ = super().step(action)
        return obs, 1.0, self.steps >= self.ep_length, False, {}


@pytest.mark.parametrize(("reset", "expected"), [(True, list(range(20, 101, 10))), (False, [620, 660, 700])])
def test_trials_go_on_in_the_next_call_of_learn(reset, expected, monkeypatch):
    """With the returns so far; where the steps are counted anew, a trial does not wait until as many have been done."""
    env = make_vec_env(OfLength, env_kwargs=dict(n_steps=10))
    model = make_model(env, average_share=1.0, learning_starts=0, gradient_steps=0, buffer_size=1000)
    grow(model, 3)
    model.learn(605)
    returns, proposed = list(model._trial_returns), []
    assert model._trial_step > 500 and returns
    monkeypatch.setattr(model.policy.frozen_critics, "propose", lambda accept: proposed.append(model.num_timesteps))
    model._setup_learn(100, reset_num_timesteps=reset)
    assert model._trial_returns == returns
    model.learn(100, reset_num_timesteps=reset)
    assert proposed == expected


class ThreeLives(gym.Wrapper):
    """Ends an episode at each of two lost lives as well, like SB3's ``EpisodicLifeEnv``."""

    is_over = True

    def reset(self, **kwargs):
        if self.is_over:
            self.obs, _ = self.env.reset(**kwargs)
        self.is_over = False
        return self.obs, {}

    def step(self, action):
        self.obs, reward, self.is_over, truncated, info = self.env.step(action)
        return self.obs, reward, self.is_over or self.unwrapped.steps in (30, 60), truncated, info


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_lost_lives_are_no_ends_of_episodes(n_envs, wrapped, monkeypatch):
    """The ``Monitor`` inside reports whole games: a game counts if the average has played all of it."""
    actors, counted = [], []

    class Record(BaseCallback):
        def _on_step(self):
            model = self.model
            actors.append(model._n_average_envs > 0)
            if self.num_timesteps == 600:  # also off and on within a game
                model.average_share = 0.0
            if self.num_timesteps == 602:
                model.average_share = 0.5
            return True

    def make_env():
        env = Monitor(OfLength(100))
        return ThreeLives(env) if wrapped else env

    model = make_model(
        DummyVecEnv([make_env] * n_envs), average_share=0.5, eval_policy="best", learning_starts=0, gradient_steps=0,
        buffer_size=4000,
    )  # fmt: skip
    grow(model, 3)
    judge = model._judge
    monkeypatch.setattr(model, "_judge", lambda: (counted.extend(model._trial_returns), judge()))
    model.learn(2000 * n_envs, callback=Record())
    games = np.reshape(actors, (-1, 100))
    whole = games.all(axis=1)
    assert (n_envs == 2 or not whole.all()) and whole.sum() > 5
    # Who acts changes only between games, but where it was switched off
    mixed = games.any(axis=1) & ~whole
    assert mixed.sum() == (600 // n_envs // 100 in np.flatnonzero(mixed))
    assert set(counted) == {100.0}


def test_lost_lives_where_the_average_is_switched_on():
    """Also then, who acts changes only between whole games."""
    actors = []

    class SwitchOn(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 250:
                self.model.average_share = 0.5
            actors.append(self.model._n_average_envs > 0)
            return True

    model = make_model(
        ThreeLives(Monitor(OfLength(100))), average_share=0.0, learning_starts=0, gradient_steps=0, buffer_size=4000
    )
    grow(model, 3)
    model.learn(2000, callback=SwitchOn())
    games = np.reshape(actors[300:], (-1, 100))
    assert 5 < games.all(axis=1).sum() < 12
    assert (games.all(axis=1) == games.any(axis=1)).all()


def test_an_interrupted_step_leaves_predict_as_it_was():
    """Ctrl-C while the environments' actions are computed."""
    policy = two_policies().policy
    obs = sample_obs(policy.observation_space, 4)
    expected = policy.logits(obs)
    with pytest.raises(KeyboardInterrupt), policy.acting_by(lambda obs: th.full((4, 3), 1000.0)):
        raise KeyboardInterrupt
    assert th.equal(policy.logits(obs), expected)


def test_predict_in_another_thread_while_learning():
    """It acts by the delivered policy, also while the candidate acts in the environments."""
    policy = two_policies().policy
    obs = sample_obs(policy.observation_space, 4)
    expected = policy.logits(obs)
    others = th.full((4, policy.branches.n_bins), 1000.0)
    with ThreadPoolExecutor(1) as other, policy.acting_by(lambda obs: others):
        assert th.equal(other.submit(policy.logits, obs).result(), expected)
        assert not th.isclose(policy.logits(obs), expected).any()


@pytest.mark.parametrize(
    ("shares", "not_yet"),  # the average's share from a step on, and a step at which none has counted
    [({0: 0.0, 300: 0.5}, 600), ({0: 0.5, 300: 0.0, 310: 0.5}, 402)],
    ids=["begun in the middle", "with a break"],
)
def test_only_whole_episodes_of_the_average_count(shares, not_yet):
    """An episode is not judged if the average did not act from its beginning on, in each of its steps."""
    ended = {}

    class SwitchAndWatch(BaseCallback):
        def _on_step(self):
            self.model.average_share = shares.get(self.num_timesteps, self.model.average_share)
            ended[self.num_timesteps] = self.model._trial_step
            return True

    env = DummyVecEnv([lambda: Monitor(OfLength(100))] * 2)  # at step 300, both are in the middle of an episode
    model = make_model(env, average_share=shares[0], learning_starts=20, gradient_steps=0, buffer_size=1000)
    grow(model, 3)
    model.learn(700, callback=SwitchAndWatch())
    assert ended[not_yet] == 0 and ended[602] == 600


def test_turns_change_between_episodes_of_their_environment():
    """Of three environments, one and a half act by the average: the second alternates."""
    turns, ends = [], []

    class Record(BaseCallback):
        def _on_step(self):
            turns.append(self.model._n_average_envs - 1)
            ends.append(self.locals["dones"][1])
            return True

    env = DummyVecEnv([RandomObsEnv] * 3)
    model = make_model(env, average_share=0.5, learning_starts=0, gradient_steps=0)
    grow(model, 3)
    model.learn(1500, callback=Record())
    changes = np.flatnonzero(np.diff(turns))
    assert len(changes) > 20 and np.all(np.array(ends)[changes])


class RecordTurns(BaseCallback):
    """Whose turn it was in the environment that alternates, step by step."""

    def __init__(self, turns):
        super().__init__()
        self.turns = turns

    def _on_step(self):
        self.turns.append(self.model._average_turn)
        return True


def share_of_turns(model, n_steps):
    """How often the average acted in the only environment."""
    turns = []
    model.learn(n_steps, callback=RecordTurns(turns))
    return np.mean(turns)


def test_turns_change_at_a_time_limit_outside_of_the_monitor():
    env = TimeLimit(Monitor(OfLength(1000)), 10)
    model = make_model(env, average_share=0.5, learning_starts=0, gradient_steps=0)
    assert 0.4 < share_of_turns(model, 300) < 0.6


def test_turns_change_in_another_environment_without_a_monitor():
    monitored, bare = (DummyVecEnv([make]) for make in (lambda: Monitor(OfLength(5)), lambda: OfLength(5)))
    model = make_model(monitored, average_share=0.5, learning_starts=0, gradient_steps=0)
    model.learn(60)
    model.set_env(bare)
    assert 0.3 < share_of_turns(model, 200) < 0.7


def test_best_without_monitor():
    """There are no returns, so it is the present average."""
    model = two_policies(n_envs=2, average_share=0.5, eval_policy="best")
    obs = sample_obs(model.observation_space, 20)
    logits = model.policy.logits(obs).double()
    expected = slow_log_probs(model, obs)["average"]
    th.testing.assert_close(slow_log_policy(model.policy, logits), expected, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="eval_policy='best' is the average: without a Monitor or VecMonitor"):
        model.learn(100)
    assert model.policy.frozen_critics.marked["best"][0] == 0


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_turns_are_balanced_in_steps(share):
    """Where the average's episodes are ten times as long, it gets as many steps, not as many episodes."""
    turns = []

    class TwoLengths(RandomObsEnv):
        def step(self, action):
            obs, reward, _, _, info = super().step(action)
            return obs, reward, self.steps >= (50 if turns and turns[-1] else 5), False, info

    model = make_model(TwoLengths(), average_share=share, learning_starts=0, gradient_steps=0, buffer_size=8000)
    model.learn(6000, callback=RecordTurns(turns))
    assert np.mean(turns) == pytest.approx(share, abs=0.02)
    # Off for a while, and on again: nothing is made up for
    model.average_share = 0.0
    turns.clear()
    model.learn(500, callback=RecordTurns(turns), reset_num_timesteps=False)
    assert sum(turns[60:]) == 0
    model.average_share = share
    turns.clear()
    model.learn(2000, callback=RecordTurns(turns), reset_num_timesteps=False)
    assert np.mean(turns) == pytest.approx(share, abs=0.05)
