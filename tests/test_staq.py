"""The algorithm as a member of Stable-Baselines3: what its off-policy algorithms do, and the training by hand."""

import copy
import csv
import itertools
import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from helpers import (
    SMALL,
    RandomObsEnv,
    by_age,
    grow,
    make_model,
    members,
    randomise,
    relative_error,
    slow_log_policy,
    slow_logit_sums,
    slow_q_values,
)
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, IdentityEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize
from torch import nn

from sb3_staq import CnnPolicy, MlpPolicy, MultiInputPolicy, StaQ


def assert_trained(model, n_steps, n_policy_updates):
    """It ran as long as it should have, learned something, and is finite."""
    assert model.num_timesteps == n_steps
    assert model._n_policy_updates == n_policy_updates
    assert len(model.policy.frozen_critics.weights) == min(n_policy_updates, model.policy.memory_size)
    params = th.cat([param.flatten() for param in model.policy.parameters()])
    assert th.isfinite(params).all()
    last_layer = model.policy.critics.net.q_net[-1]
    assert last_layer.weight.abs().max() > 0 or last_layer.bias.abs().max() > 0  # they start at zero


# It runs


@pytest.mark.parametrize("policy", ["MlpPolicy", MlpPolicy])
@pytest.mark.parametrize("env", ["CartPole-v1", "gym", "vec"])
def test_cartpole(env, policy):
    """A name, an environment or a vectorised one; a policy's name or class."""
    if env != "CartPole-v1":
        env = gym.make("CartPole-v1") if env == "gym" else make_vec_env("CartPole-v1", n_envs=2)
    model = make_model(env, policy).learn(100)
    assert_trained(model, 100, 8)
    assert type(model.policy) is MlpPolicy


@pytest.mark.parametrize("seed", [0, 1])
def test_identity_env_is_solved(seed):
    """The reward depends on the observation only: at least 90 of 100 in the evaluation."""
    model = make_model(
        IdentityEnv(4),
        memory_size=20,
        kl_coef=0.3,
        gamma=0.5,
        batch_size=64,
        buffer_size=2000,
        learning_rate=3e-3,
        policy_update_interval=50,
        seed=seed,
    )
    before, _ = evaluate_policy(model, Monitor(IdentityEnv(4)), n_eval_episodes=2)
    model.learn(1000)
    after, _ = evaluate_policy(model, Monitor(IdentityEnv(4)), n_eval_episodes=5)
    assert before < 60
    assert after >= 90


@pytest.mark.parametrize("channel_first", [True, False])
def test_images(channel_first):
    env = FakeImageEnv(screen_height=40, screen_width=36, n_channels=2, channel_first=channel_first, discrete=True)
    kwargs = dict(features_extractor_kwargs=dict(features_dim=8))
    model = StaQ(
        "CnnPolicy",
        env,
        policy_kwargs=kwargs,
        buffer_size=100,
        learning_starts=10,
        batch_size=8,
        policy_update_interval=10,
        train_freq=1,
        gradient_steps=1,
        device="cpu",
    )
    assert type(model.policy) is CnnPolicy
    model.learn(40)
    assert_trained(model, 40, 3)
    obs, _ = env.reset()
    action, _ = model.predict(obs, deterministic=True)
    assert env.action_space.contains(int(action))
    assert model.policy.logits(th.zeros(1, 2, 40, 36)).shape == (1, 6)  # channels first


def test_stacked_frames():
    env = DummyVecEnv([lambda: FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=True)])
    kwargs = dict(features_extractor_kwargs=dict(features_dim=8))
    model = make_model(VecFrameStack(env, 4), "CnnPolicy", policy_kwargs=kwargs).learn(40)
    assert_trained(model, 40, 2)
    assert model.observation_space.shape == (4, 36, 36)


@pytest.mark.parametrize("channel_last", [True, False])
def test_dict_observations(channel_last):
    env = SimpleMultiObsEnv(channel_last=channel_last)
    kwargs = dict(features_extractor_kwargs=dict(cnn_output_dim=8))
    model = make_model(
        DummyVecEnv([lambda: copy.deepcopy(env)] * 2), "MultiInputPolicy", policy_kwargs=kwargs, gradient_steps=1
    )
    assert type(model.policy) is MultiInputPolicy
    model.learn(60)
    assert_trained(model, 60, 4)
    evaluate_policy(model, Monitor(env), n_eval_episodes=1, warn=False)


@pytest.mark.parametrize("obs_kind", ["bits", "discrete", "image"])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_hindsight_experience_replay(obs_kind, n_envs):
    kwargs = dict(n_bits=4, discrete_obs_space=obs_kind == "discrete", image_obs_space=obs_kind == "image")
    model = make_model(
        make_vec_env(BitFlippingEnv, n_envs=n_envs, env_kwargs=kwargs),
        "MultiInputPolicy",
        policy_kwargs=dict(features_extractor_kwargs=dict(cnn_output_dim=8)),
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=dict(n_sampled_goal=2, goal_selection_strategy="future"),
        gradient_steps=1,
    )
    model.learn(60)
    assert_trained(model, 60, 4)
    assert type(model.replay_buffer) is HerReplayBuffer


def test_hindsight_experience_replay_in_every_batch():
    """Each gradient step gets as many relabelled transitions as the buffer is asked for: four of five."""
    model = make_model(
        BitFlippingEnv(n_bits=8),
        "MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=dict(n_sampled_goal=4, goal_selection_strategy="final"),
    )
    model.learn(400)  # random flips do not reach the goal, but do reach that of the relabelled last transition
    real_goals = {tuple(goal) for goal in model.replay_buffer.observations["desired_goal"][:, 0]}
    batches = list(model.replay.batches(20, 50))
    assert [len(batch.rewards) for batch in batches] == [50] * 20
    shares = [
        np.mean([tuple(goal) not in real_goals for goal in batch.observations["desired_goal"].numpy()])
        for batch in batches
    ]
    assert max(shares) - min(shares) < 0.3
    assert 0.6 < np.mean(shares) <= 0.8


def test_hindsight_experience_replay_solves_bit_flipping():
    """The reward is sparse: random actions reach few goals, relabelled transitions teach to reach nearly all."""
    model = make_model(
        BitFlippingEnv(n_bits=6),
        "MultiInputPolicy",
        net_arch=(64,),
        buffer_size=10_000,
        learning_starts=200,
        batch_size=64,
        learning_rate=1e-3,
        gamma=0.9,
        memory_size=20,
        ent_coef=0.02,
        kl_coef=0.2,
        policy_update_interval=100,
        target_update_interval=50,
        train_freq=2,
        gradient_steps=1,
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=dict(n_sampled_goal=4),
    )

    def share_of_goals_reached():
        env = Monitor(BitFlippingEnv(n_bits=6))
        rewards, _ = evaluate_policy(model, env, n_eval_episodes=50, deterministic=False, return_episode_rewards=True)
        return np.mean(np.array(rewards) > -6)  # -1 for each of six steps: not reached

    assert share_of_goals_reached() <= 0.4  # an empty stack: uniformly random
    model.learn(2500)
    assert share_of_goals_reached() >= 0.8


DISCRETE = dict(
    learning_rate=3e-4,
    batch_size=256,
    tau=0.005,
    critic="additive",
    critic_reduction="mean",
    kl_coef=0.5,
    ent_coef=0.05,
    policy_update_interval=500,
    exploration_initial_eps=0.05,
    exploration_final_eps=0.05,
)
FACTORED_BOX = dict(
    learning_rate=7e-4,
    batch_size=128,
    tau=0.01,
    critic="joint",
    critic_reduction="min",
    kl_coef="rel_0.5",
    ent_coef="auto_0.2",
    policy_update_interval=100,
    exploration_initial_eps=0.0,
    exploration_final_eps=0.0,
)


@pytest.mark.parametrize(
    ("action_space", "kwargs", "expected"),
    [
        (spaces.Discrete(3), {}, DISCRETE),
        (spaces.MultiDiscrete([2, 3]), {}, DISCRETE),
        (spaces.Box(-1, 1, (2,), np.float32), {}, FACTORED_BOX),
        (spaces.Box(-1, 1, (2,), np.float32), dict(action_grid="axis"), DISCRETE),
        (spaces.Box(-1, 1, (2,), np.float32), dict(critic="additive", memory_size=7), FACTORED_BOX),
        (spaces.Discrete(3), dict(ent_coef="auto", kl_coef=0), DISCRETE),
    ],
)
def test_defaults_suit_the_action_space(tmp_path, action_space, kwargs, expected):
    """They fill in for what is not given, and are not looked up again when a model is loaded."""
    model = StaQ("MlpPolicy", RandomObsEnv(action_space=action_space), device="cpu", **kwargs)
    expected = {**expected, **kwargs}
    assert {name: getattr(model, name) for name in expected} == expected
    model.save(tmp_path / "model.zip")
    loaded = StaQ.load(tmp_path / "model.zip", device="cpu")
    assert {name: getattr(loaded, name) for name in expected} == expected
    assert loaded.policy.critic == model.policy.critic == expected["critic"]
    assert loaded.lr_schedule(1.0) == expected["learning_rate"]
    main_effects = dict(pi=[128, 128], qf=[256, 256])
    assert loaded.policy.net_arch == (main_effects if expected["critic"] == "joint" else [256, 256])


class DiscreteObsEnv(RandomObsEnv):
    def __init__(self, observation_space):
        super().__init__()
        self.observation_space = observation_space


@pytest.mark.parametrize(
    "observation_space",
    [spaces.Discrete(5), spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(4), spaces.Box(-1, 1, (2, 3))],
    ids=str,
)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_observation_spaces(observation_space, n_envs):
    env = DummyVecEnv([lambda: DiscreteObsEnv(copy.deepcopy(observation_space))] * n_envs)
    model = make_model(env).learn(60)
    assert_trained(model, 60, 4)
    obs = observation_space.sample()
    assert model.predict(obs, deterministic=True)[0].shape == ()
    assert model.predict(np.stack([obs] * 5), deterministic=True)[0].shape == (5,)


@pytest.mark.parametrize("logit_cache", [True, False])
@pytest.mark.parametrize("start", [-2, 5])
def test_actions_that_do_not_start_at_zero(start, logit_cache):
    """The environment and the replay buffer get the space's actions; the right choice is learned."""
    env = RandomObsEnv(n_actions=2, start=start)
    model = make_model(
        env, gamma=0.0, logit_cache=logit_cache, memory_size=20, buffer_size=1000, exploration_initial_eps=0.3
    )
    model.learn(400)
    assert set(env.actions) == {start, start + 1}
    assert np.array_equal(model.replay_buffer.actions[:400].ravel(), env.actions)
    obs = np.random.default_rng(0).uniform(-1, 1, (200, 4)).astype(np.float32)
    actions, _ = model.predict(obs, deterministic=True)
    assert np.mean(actions == start + (obs[:, 0] > 0)) > 0.9


def test_single_action():
    """Nothing to choose, no entropy: it runs and stays finite."""
    model = make_model(RandomObsEnv(n_actions=1)).learn(50)
    assert_trained(model, 50, 3)
    assert model.logger.name_to_value["train/entropy"] == 0.0


@pytest.mark.parametrize("vec_env_class", [DummyVecEnv, SubprocVecEnv])
def test_vectorised_environments(vec_env_class):
    kwargs = dict(start_method="fork") if vec_env_class is SubprocVecEnv else {}
    env = make_vec_env("CartPole-v1", n_envs=3, vec_env_cls=vec_env_class, vec_env_kwargs=kwargs, seed=0)
    model = make_model(env, train_freq=2).learn(120)
    env.close()
    assert_trained(model, 120, 10)
    assert model.replay_buffer.pos == 40


def test_same_training_in_either_kind_of_vectorised_environment():
    params = []
    for vec_env_class, kwargs in [(DummyVecEnv, {}), (SubprocVecEnv, dict(start_method="fork"))]:
        env = make_vec_env("CartPole-v1", n_envs=2, vec_env_cls=vec_env_class, vec_env_kwargs=kwargs)
        model = make_model(env).learn(80)
        params.append(th.cat([param.flatten() for param in model.policy.parameters()]))
        env.close()
    assert th.equal(*params)


@pytest.mark.parametrize("norm_obs", [True, False])
@pytest.mark.parametrize("kind", ["box", "dict"])
def test_vec_normalize(kind, norm_obs):
    keys = ["a"] if kind == "dict" else None
    env = VecNormalize(DummyVecEnv([lambda: RandomObsEnv(kind)] * 2), norm_obs=norm_obs, norm_obs_keys=keys)
    model = make_model(env, "MultiInputPolicy" if kind == "dict" else "MlpPolicy").learn(60)
    assert_trained(model, 60, 4)
    assert model.get_vec_normalize_env() is env
    stored = model.replay_buffer.observations
    stored = stored["a"] if kind == "dict" else stored
    assert np.abs(stored).max() <= 1  # not normalised


def test_learn_takes_a_float():
    model = make_model().learn(1e2)
    assert_trained(model, 100, 8)
    assert isinstance(model._total_timesteps, int)


def test_check_env_environments():
    """What SB3's checker accepts can be trained on."""
    for kind in ("box", "dict", "discrete"):
        env = RandomObsEnv(kind)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(env)
        assert_trained(make_model(env, "MultiInputPolicy" if kind == "dict" else "MlpPolicy").learn(40), 40, 2)


class TinyExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space, features_dim=3):
        super().__init__(observation_space, features_dim)
        self.linear = nn.Linear(int(np.prod(observation_space.shape)), features_dim)

    def forward(self, obs):
        return self.linear(obs)


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        dict(activation_fn=nn.Tanh),
        dict(activation_fn=nn.PReLU),
        dict(optimizer_class=th.optim.RMSprop, optimizer_kwargs=dict(eps=1e-5)),
        dict(optimizer_class=th.optim.SGD),
        dict(optimizer_kwargs=dict(weight_decay=0.1)),
        dict(features_extractor_class=TinyExtractor, features_extractor_kwargs=dict(features_dim=2)),
    ],
    ids=str,
)
def test_custom_policies(policy_kwargs, tmp_path):
    model = make_model(policy_kwargs=policy_kwargs, n_critics=3).learn(50)
    assert_trained(model, 50, 3)
    assert type(model.policy.optimizer) is policy_kwargs.get("optimizer_class", th.optim.Adam)
    if "features_extractor_class" in policy_kwargs:
        assert model.policy.critics.net.features_extractor.linear.weight.shape == (3, 2, 4)
    model.save(tmp_path / "model")
    obs = th.ones(3, 4)
    assert th.equal(StaQ.load(tmp_path / "model").policy.logits(obs), model.policy.logits(obs))


class BackboneExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space, backbone):
        super().__init__(observation_space, 3)
        self.backbone = backbone

    def forward(self, obs):
        return self.backbone(obs)


@pytest.mark.parametrize("critic", ["additive", "joint"])
def test_modules_in_the_policy_arguments_stay_as_they_are(critic, tmp_path):
    """A pretrained network, say: all critics start from it, and nothing changes it."""
    backbone = nn.Linear(4, 3)
    before = backbone.weight.detach().clone()
    extractor = dict(features_extractor_class=BackboneExtractor, features_extractor_kwargs=dict(backbone=backbone))
    model = make_model(critic=critic, policy_kwargs=extractor)
    assert all(th.equal(net.features_extractor.backbone.weight, before) for net in members(model.policy.critics))
    assert_trained(model.learn(50), 50, 3)
    assert th.equal(backbone.weight, before)
    model.save(tmp_path / "model")
    obs = th.ones(3, 4)
    assert th.equal(StaQ.load(tmp_path / "model").policy.logits(obs), model.policy.logits(obs))


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


# When policy updates come


class UpdateSteps(BaseCallback):
    """The time steps after which policy updates were done, and the gradient steps done by then."""

    def _on_training_start(self):
        self.updates = []

    def _note(self):
        new = self.model._n_policy_updates - len(self.updates)
        self.updates += [(self.model.num_timesteps, self.model._n_updates)] * new

    def _on_rollout_start(self):
        self._note()

    def _on_step(self):
        return True

    def _on_training_end(self):
        self._note()


COMBINATIONS = [
    # n_envs, train_freq, gradient_steps, policy_update_interval, learning_starts
    (1, 1, -1, 10, 20),
    (1, 1, 1, 1, 0),
    (1, 1, 1, 7, 3),
    (1, 4, 1, 10, 20),
    (1, 4, -1, 4, 0),
    (1, 4, 3, 3, 10),
    (1, 5, 5, 1, 17),
    (1, 50, -1, 10, 20),
    (1, 50, 3, 20, 20),
    (2, 1, 1, 10, 21),
    (3, 1, -1, 10, 20),
    (3, 1, 1, 3, 0),
    (3, 7, -1, 5, 31),
    (4, 2, 8, 1, 9),
    (4, 10, -1, 33, 50),
    (5, 1, 1, 500, 0),
]


@pytest.mark.parametrize(("n_envs", "train_freq", "gradient_steps", "interval", "learning_starts"), COMBINATIONS)
def test_number_and_times_of_policy_updates(n_envs, train_freq, gradient_steps, interval, learning_starts):
    """
    One update for every ``interval`` environment steps after ``learning_starts``, at the end of the first rollout that
    reaches them, whatever the other numbers are.
    """
    callback = UpdateSteps()
    env = DummyVecEnv([RandomObsEnv] * n_envs)
    model = make_model(
        env,
        train_freq=train_freq,
        gradient_steps=gradient_steps,
        policy_update_interval=interval,
        learning_starts=learning_starts,
        batch_size=4,
        memory_size=2,
    )
    total = 150
    model.learn(total, callback=callback)
    per_rollout = n_envs * train_freq
    rollout_ends = range(per_rollout, total + per_rollout, per_rollout)
    expected = []
    for due in range(learning_starts + interval, rollout_ends[-1] + 1, interval):
        expected.append(next(end for end in rollout_ends if end >= due))
    assert [step for step, _ in callback.updates] == expected
    assert model._n_policy_updates == (rollout_ends[-1] - learning_starts) // interval
    per_training = per_rollout if gradient_steps == -1 else gradient_steps
    assert model._n_updates == per_training * sum(end > learning_starts for end in rollout_ends)
    for step, n_updates in callback.updates:
        assert n_updates == per_training * sum(learning_starts < end <= step for end in rollout_ends)


def test_at_most_one_policy_update_per_gradient_step():
    """Without a gradient step in between, a critic would be pushed twice; what is skipped is not made up for."""
    model = make_model(
        RandomObsEnv(), train_freq=10, gradient_steps=2, policy_update_interval=1, learning_starts=20, memory_size=100
    )
    model.learn(60)
    assert model._n_updates == 2 * 4
    assert model._n_policy_updates == 2 * 4
    values = [entry.net.q_net[-1].bias.clone() for entry in by_age(model.policy)]
    assert not any(th.equal(a, b) for a, b in itertools.pairwise(values))
    model.policy_update_interval = 1000
    model.learn(60, reset_num_timesteps=False)
    assert model._n_policy_updates == 2 * 4


@pytest.mark.parametrize(("gradient_steps", "n_trainings"), [(-1, 5), (1, 5), (3, 5)])
def test_training_by_episodes(gradient_steps, n_trainings):
    """``train_freq`` in episodes: updates are still counted in steps."""

    class TenSteps(RandomObsEnv):
        def step(self, action):
            obs, reward, *_ = super().step(action)
            return obs, reward, self.steps == 10, False, {}

    callback = UpdateSteps()
    model = make_model(
        TenSteps(),
        train_freq=(2, "episode"),
        gradient_steps=gradient_steps,
        learning_starts=15,
        policy_update_interval=25,
    )
    model.learn(100, callback=callback)
    assert model._n_updates == {-1: 100, 1: 5, 3: 15}[gradient_steps]
    assert [step for step, _ in callback.updates] == [40, 80, 100]  # due at 40, 65, 90


def test_no_gradient_steps():
    """``gradient_steps=0`` collects only."""
    model = make_model(gradient_steps=0).learn(60)
    assert (model._n_updates, model._n_policy_updates, model.replay_buffer.pos) == (0, 0, 60)


def test_updates_after_a_second_learn():
    """With a reset, the first ``learning_starts`` steps do not count again; what is left of an interval is kept."""
    model = make_model().learn(57)
    assert model._n_policy_updates == 3  # 30, 40, 50
    model.learn(5, reset_num_timesteps=False)
    assert model._n_policy_updates == 4  # 60
    model.learn(45)
    assert model._n_policy_updates == 6  # 30, 40
    model.learn(20, reset_num_timesteps=False)
    assert model._n_policy_updates == 8  # 50, 60
    assert model.num_timesteps == 65


# The training by hand


def prepared_model(env, n_collected=150, **kwargs):
    """Random critics, targets and stack, and transitions; nothing trained yet."""
    model = make_model(env, **{**kwargs, "learning_starts": 10**6})
    grow(model, 5, ent_coef=model._current_ent_coef)
    randomise(model.policy.critics, 100)
    randomise(model.policy.critics_target, 101)
    model.learn(n_collected)
    return model


class ByHand:
    """StaQ's gradient steps and policy updates on ordinary networks, sample by sample, from the paper's formulas."""

    def __init__(self, model):
        self.model, policy = model, model.policy
        self.nets, self.targets = members(policy.critics), members(policy.critics_target)
        self.stack = [members(entry) for entry in by_age(policy)]
        self.weights = list(policy.frozen_critics.weights.values)
        self.scale = policy.frozen_critics.weights.scale
        self.ent_coef = model.ent_coef
        space = model.action_space
        sizes = {
            spaces.Discrete: lambda: [int(space.n)],
            spaces.MultiDiscrete: lambda: space.nvec.tolist(),
            spaces.MultiBinary: lambda: [2] * space.n,
            spaces.Box: lambda: [model.action_bins] * space.shape[0],
        }[type(space)]()
        ends = np.cumsum(sizes).tolist()
        self.columns = [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
        params = [param for net in self.nets for param in net.parameters()]
        for param in params:
            param.requires_grad_(True)
        self.optimizer = policy.optimizer_class(params, lr=model.learning_rate)
        self.n_updates = 0

    def chosen_columns(self, action):
        """The columns of a stored action."""
        space = self.model.action_space
        if isinstance(space, spaces.Box):
            values = np.linspace(-1, 1, self.model.action_bins)
            choices = [int(np.abs(values - a.item()).argmin()) for a in action]
        else:
            start = space.start if isinstance(space, spaces.Discrete) else 0
            choices = [int(a) - int(start) for a in action]
        return [columns[choice] for columns, choice in zip(self.columns, choices, strict=True)]

    def log_policy(self, obs):
        obs = self.model.policy.preprocess(obs)
        with th.no_grad():
            q_values = [th.stack([net(obs) for net in nets]).mean(0) for nets in self.stack]
        total = sum(weight * q for weight, q in zip(self.weights, q_values, strict=True))
        return th.cat([(self.scale * total[:, columns]).log_softmax(-1) for columns in self.columns], dim=-1)

    def gradient_step(self, batch):
        model = self.model
        with th.no_grad():
            next_obs = model.policy.preprocess(batch.next_observations)
            next_q = [net(next_obs).tolist() for net in self.targets]
        reduce = {"mean": np.mean, "min": np.min}[model.critic_reduction]
        targets = []
        for i, log_pi in enumerate(self.log_policy(batch.next_observations).tolist()):
            entropy, expected_q = 0.0, np.zeros(len(next_q))
            for columns in itertools.product(*self.columns):  # all joint actions
                log_p = sum(log_pi[column] for column in columns)
                entropy -= np.exp(log_p) * log_p
                expected_q += [np.exp(log_p) * sum(q[i][column] for column in columns) for q in next_q]
            value = reduce(expected_q) + self.ent_coef * entropy
            discount = model.gamma if batch.discounts is None else batch.discounts[i].item()
            bootstrap = discount * value if batch.dones[i].item() == 0 else 0.0
            targets.append(model.reward_scale * batch.rewards[i].item() + bootstrap)
        obs = model.policy.preprocess(batch.observations)
        loss = 0.0
        for net in self.nets:
            q_values = net(obs)
            chosen = th.stack([q_values[i, self.chosen_columns(a)].sum() for i, a in enumerate(batch.actions)])
            loss = loss + ((chosen - th.tensor(targets)) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.n_updates += 1
        if self.n_updates % model.target_update_interval == 0:
            for net, target in zip(self.nets, self.targets, strict=True):
                for param, target_param in zip(net.parameters(), target.parameters(), strict=True):
                    target_param.data = (1 - model.tau) * target_param.data + model.tau * param.data
        return loss.item(), targets

    def policy_update(self):
        model = self.model
        alpha = 1 / (model.kl_coef + self.ent_coef)
        beta = model.kl_coef * alpha
        self.stack = [*self.stack, [copy.deepcopy(net) for net in self.nets]][-model.memory_size :]
        self.weights = [*(beta * weight for weight in self.weights), 1.0][-model.memory_size :]
        self.scale = alpha / (1 - beta**model.memory_size)

    def assert_same(self, rtol=1e-5):
        policy = self.model.policy
        for ensemble, nets in [(policy.critics, self.nets), (policy.critics_target, self.targets)]:
            for name, param in ensemble.net.named_parameters():
                expected = th.stack([net.get_parameter(name).detach() for net in nets])
                assert relative_error(param.detach(), expected) < rtol, name


TD_CASES = {
    "plain": dict(),
    "direct": dict(logit_cache=False),
    "n_step": dict(n_steps=3),
    "n_envs": dict(n_envs=3),
    "min": dict(critic_reduction="min", n_critics=3),
    "one_critic": dict(n_critics=1),
    "reward_scale": dict(reward_scale=7.0),
    "gamma": dict(gamma=0.5, tau=0.3, target_update_interval=2),
    "start": dict(start=3),
    "dict": dict(kind="dict", policy="MultiInputPolicy"),
    "discrete": dict(kind="discrete"),
    "low_memory": dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
    "normalized": dict(normalized=True),
    "adam": dict(policy_kwargs=dict()),
    "multi_discrete": dict(action_space=spaces.MultiDiscrete([2, 3])),
    "multi_binary": dict(action_space=spaces.MultiBinary(3)),
    "box": dict(action_space=spaces.Box(-3, 1, (2,), np.float32), action_bins=4),
    "min_of_several_branches": dict(action_space=spaces.MultiDiscrete([2, 3]), critic_reduction="min"),
}


@pytest.mark.parametrize("case", TD_CASES)
def test_gradient_steps_by_hand(case):
    """Four gradient steps give the parameters, the targets, the loss and the TD error of the formulas."""
    kwargs = {"policy_kwargs": dict(optimizer_class=th.optim.SGD), "ent_coef": 0.7, **TD_CASES[case]}
    kind, n_envs, start = kwargs.pop("kind", "box"), kwargs.pop("n_envs", 1), kwargs.pop("start", 0)
    action_space = kwargs.pop("action_space", None)
    env = DummyVecEnv([lambda: RandomObsEnv(kind, start=start, action_space=action_space)] * n_envs)
    if kwargs.pop("normalized", False):
        env = VecNormalize(env)
    model = prepared_model(env, learning_rate=1e-3, **kwargs)
    by_hand = ByHand(model)
    before = [param.clone() for param in model.policy.critics.parameters()]
    np.random.seed(5)
    model.train(gradient_steps=4, batch_size=32)
    np.random.seed(5)
    samples = model.replay.sample(4 * 32)
    assert (type(model.replay_buffer) is NStepReplayBuffer) == (case == "n_step")
    assert 0 < samples.dones.sum().item() < 100
    losses = [by_hand.gradient_step(batch)[0] for batch in samples.split(32)]
    by_hand.assert_same()
    changes = [a - b for a, b in zip(model.policy.critics.parameters(), before, strict=True)]
    assert all(change.abs().max() > 1e-4 for change in changes)
    assert model.logger.name_to_value["train/critic_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert model._n_updates == 4
    assert model._n_policy_updates == 0


@pytest.mark.parametrize("logit_cache", [True, False])
@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3])], ids=str)
def test_policy_updates_by_hand(action_space, logit_cache):
    """
    Nine gradient steps with three policy updates: the critics of each phase are trained under the policy that the
    previous phase gave. One stored transition, so that every batch is the same.
    """
    env = RandomObsEnv(action_space=action_space)
    model = prepared_model(env, n_collected=1, logit_cache=logit_cache, memory_size=6, gamma=0.9, ent_coef=0.5)
    model.replay_buffer.dones[:] = 0
    model.learning_starts = 0
    model._steps_since_train = 30
    by_hand = ByHand(model)
    model.train(gradient_steps=9, batch_size=4)
    batch = model.replay_buffer.sample(4)
    for _ in range(3):
        for _ in range(3):
            by_hand.gradient_step(batch)
        old_log_pi = by_hand.log_policy(batch.next_observations)
        by_hand.policy_update()
    by_hand.assert_same(rtol=1e-4)
    assert len(model.policy.frozen_critics.weights) == len(by_hand.stack) == 6
    obs = th.randn(10, 4, generator=th.Generator().manual_seed(0))
    th.testing.assert_close(
        slow_log_policy(model.policy, model.policy.logits(obs)), by_hand.log_policy(obs), rtol=1e-3, atol=1e-4
    )
    # What is logged is about the last update
    log_pi = by_hand.log_policy(batch.next_observations)
    logged = model.logger.name_to_value
    entropy = -(log_pi.exp() * log_pi).sum(-1).mean().item()
    entropy /= sum(np.log(len(columns)) for columns in by_hand.columns)
    assert logged["train/entropy"] == pytest.approx(entropy, rel=1e-3)
    kl_divergence = (log_pi.exp() * (log_pi - old_log_pi)).sum(-1).mean().item()
    assert logged["train/kl_divergence"] == pytest.approx(kl_divergence, rel=1e-2)
    assert logged["train/ent_coef"] == 0.5
    assert logged["train/kl_coef"] == 1.0
    assert logged["train/beta"] == pytest.approx(1 / 1.5)
    assert logged["train/n_frozen_critics"] == 6
    assert logged["train/oldest_weight"] == pytest.approx(by_hand.weights[0])


class OneStateEnv(gym.Env):
    """One state, reward 1, and every step ends the episode: by truncation or by termination."""

    observation_space = spaces.Box(0, 1, (2,), np.float32)

    def __init__(self, truncates, n_actions=2):
        self.truncates, self.action_space = truncates, spaces.Discrete(n_actions)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(2, np.float32), {}

    def step(self, action):
        return np.ones(2, np.float32), 1.0, not self.truncates, self.truncates, {}


@pytest.mark.parametrize("n_actions", [1, 3])
@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("truncates", [True, False])
def test_timeouts_bootstrap_and_terminations_do_not(truncates, n_steps, n_actions):
    """
    The value of the uniform policy: 1 where episodes terminate; where they only time out, the solution of
    ``Q = 1 + gamma (Q + ent_coef log n)``.
    """
    model = make_model(
        OneStateEnv(truncates, n_actions),
        net_arch=(),
        learning_rate=0.05,
        gamma=0.5,
        ent_coef=0.4,
        n_steps=n_steps,
        gradient_steps=5,
        target_update_interval=5,
        policy_update_interval=10**6,
    )
    model.learn(150)
    q_values = model.policy.q_values(model.policy.critics, th.ones(1, 2))
    expected = (1 + 0.5 * 0.4 * np.log(n_actions)) / (1 - 0.5) if truncates else 1.0
    np.testing.assert_allclose(q_values, expected, rtol=1e-3)


# Coefficients


@pytest.mark.parametrize(
    ("ent_coef", "kl_coef", "ent_at", "kl_at"),
    [
        ("lin_0.5_0.1", "lin_2", lambda p: 0.1 + 0.4 * p, lambda p: 2 * p),
        ("lin_0.4_0.2_0.5", 3, lambda p: max(0.2, 0.4 - 0.2 * (1 - p) / 0.5), lambda p: 3.0),
        (lambda p: 0.1 + p**2, lambda p: 1 + p, lambda p: 0.1 + p**2, lambda p: 1 + p),
        (1, "lin_1_5", lambda p: 1.0, lambda p: 5 - 4 * p),
    ],
)
def test_schedules_of_the_coefficients(ent_coef, kl_coef, ent_at, kl_at):
    """At every policy update the coefficients are those of the progress then, and decide the weights."""

    class Watch(BaseCallback):
        seen = 0

        def _on_step(self):
            return True

        def _on_rollout_start(self):
            model = self.model
            if model._n_policy_updates == self.seen:
                return
            self.seen += 1
            progress = 1 - model.num_timesteps / 200
            logged = model.logger.name_to_value
            ent, kl = ent_at(progress), kl_at(progress)
            assert logged["train/ent_coef"] == pytest.approx(ent)
            assert logged["train/kl_coef"] == pytest.approx(kl)
            assert logged["train/beta"] == pytest.approx(kl / (kl + ent))
            weights = model.policy.frozen_critics.weights
            assert weights.scale == pytest.approx(1 / (kl + ent) / (1 - (kl / (kl + ent)) ** 4))
            if self.seen > 1:
                assert weights.values[-2] == pytest.approx(kl / (kl + ent))

    callback = Watch()
    make_model(ent_coef=ent_coef, kl_coef=kl_coef).learn(200, callback=callback, log_interval=None)
    assert callback.seen >= 17


def test_entropy_coefficient_that_falls_to_zero():
    """The corrected rule divides by it: it follows the schedule down to 1% of the first value; others go to 0."""
    ends = {}
    for rule in ("weight_corrected", "truncated"):
        model = make_model(ent_coef="lin_0.5", logit_rule=rule).learn(200, log_interval=None)
        ends[rule] = model.logger.name_to_value["train/ent_coef"]
        assert th.isfinite(model.policy.logits(th.zeros(1, 4))).all()
    assert ends["weight_corrected"] == pytest.approx(0.005)
    assert ends["truncated"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("kind", ["Discrete", "MultiDiscrete", "Box"])
def test_custom_weights(kind):
    """Trained and acted upon: the stack is evaluated directly, for the cache's recursion would be wrong."""
    action_space = {
        "Discrete": None,
        "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
        "Box": spaces.Box(-1, 1, (2,), np.float32),
    }[kind]
    model = make_model(RandomObsEnv(action_space=action_space), logit_rule=[3.0, 2.0, -1.0, 0.5]).learn(100)
    assert len(model.policy.frozen_critics.weights) == 4
    assert model.replay.cache is None
    obs = th.as_tensor(np.random.default_rng(0).uniform(-1, 1, (20, 4)), dtype=th.float32)
    newest_first = [slow_q_values(entry, obs) for entry in reversed(by_age(model.policy))]
    expected = sum(weight * q for weight, q in zip([3.0, 2.0, -1.0, 0.5], newest_first, strict=True))
    assert relative_error(model.policy.logits(obs), expected) < 1e-5
    with pytest.raises(ValueError, match=r"logit_cache=True.*logit_rule=\(3.0, .*expected 'auto' or False"):
        make_model(RandomObsEnv(action_space=action_space), logit_rule=[3.0, 2.0, -1.0, 0.5], logit_cache=True)


def test_targets_use_the_coefficient_of_the_current_policy():
    """The entropy bonus is that of the last policy update (before the first: the initial one), not of the moment."""
    model = prepared_model(
        RandomObsEnv(),
        ent_coef="lin_1.0",
        policy_kwargs=dict(optimizer_class=th.optim.SGD),
        learning_rate=1e-3,
        memory_size=10,
    )
    model.learning_starts = 0
    model.policy_update_interval = 50
    by_hand = ByHand(model)
    # No update is due at step 30; one is at step 60, after the gradient step; none at 90
    for step, coefficient, updates in [(30, 1.0, False), (60, 1.0, True), (90, 0.4, False)]:
        model._steps_since_train = 30
        model._update_current_progress_remaining(step, 100)
        by_hand.ent_coef = coefficient
        np.random.seed(step)
        model.train(gradient_steps=1, batch_size=32)
        np.random.seed(step)
        by_hand.gradient_step(model.replay_buffer.sample(32))
        by_hand.assert_same()
        if updates:
            by_hand.ent_coef = 0.4
            by_hand.policy_update()
            assert by_hand.scale == pytest.approx(model.policy.frozen_critics.weights.scale)
            assert by_hand.weights == pytest.approx(model.policy.frozen_critics.weights.values)
    assert model._n_policy_updates == 1


def test_learning_rate_schedule():
    model = make_model(learning_rate=lambda progress: 0.01 * progress)
    model.learn(100, log_interval=None)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    assert model.logger.name_to_value["train/learning_rate"] == pytest.approx(0.0, abs=1e-9)
    model = make_model(learning_rate=0.0)
    model.learn(60)
    assert (model.policy.critics.net.q_net[-1].weight == 0).all()


# Seeding


@pytest.mark.parametrize("n_envs", [1, 2])
def test_deterministic_seeding(n_envs):
    """One seed, one result; another seed, another result."""
    results = []
    for seed in (0, 0, 1):
        env = DummyVecEnv([RandomObsEnv] * n_envs)
        model = make_model(env, seed=seed).learn(150)
        actions = [single.actions for single in env.envs]
        results.append((actions, th.cat([param.flatten() for param in model.policy.parameters()])))
    assert results[0][0] == results[1][0]
    assert th.equal(results[0][1], results[1][1])
    assert results[0][0] != results[2][0]
    assert not th.equal(results[0][1], results[2][1])


# Predicting and acting


@pytest.mark.parametrize("kind", ["box", "dict", "discrete", "image"])
def test_predict_shapes(kind):
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
def test_predict_shapes_of_actions_of_several_dimensions(action_space, tmp_path):
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


# Callbacks


def test_callbacks(tmp_path):
    """The usual ones, together: what they write loads and is what they say."""
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    evaluation = EvalCallback(
        make_vec_env("CartPole-v1", seed=1),
        n_eval_episodes=2,
        eval_freq=25,
        best_model_save_path=str(tmp_path / "best"),
        log_path=str(tmp_path),
        deterministic=True,
        verbose=0,
    )
    checkpoints = CheckpointCallback(30, str(tmp_path / "checkpoints"), save_replay_buffer=True)

    class Count(BaseCallback):
        n_calls_seen = n_starts = n_ends = n_rollouts = 0

        def _on_training_start(self):
            self.n_starts += 1

        def _on_rollout_start(self):
            self.n_rollouts += 1

        def _on_step(self):
            self.n_calls_seen += 1
            assert {"self", "new_obs", "rewards", "dones", "infos"} <= set(self.locals)
            return True

        def _on_training_end(self):
            self.n_ends += 1

    count, every = Count(), Count()
    model = make_model(env, train_freq=4)
    model.learn(160, callback=CallbackList([evaluation, checkpoints, count, EveryNTimesteps(40, every)]))
    assert (count.n_calls_seen, count.n_starts, count.n_rollouts, count.n_ends) == (80, 1, 20, 1)
    assert every.n_calls_seen == 4
    results = np.load(tmp_path / "evaluations.npz")
    assert results["timesteps"].tolist() == [50, 100, 150]
    assert results["results"].shape == (3, 2)
    assert evaluation.best_mean_reward == results["results"].mean(axis=1).max()
    assert StaQ.load(tmp_path / "best" / "best_model").num_timesteps in (50, 100, 150)
    checkpoint = StaQ.load(tmp_path / "checkpoints" / "rl_model_120_steps", env=env)
    assert checkpoint.num_timesteps == 120
    checkpoint.load_replay_buffer(tmp_path / "checkpoints" / "rl_model_replay_buffer_120_steps")
    assert checkpoint.replay_buffer.pos == 59  # callbacks come before the transition is stored
    checkpoint.learn(20, reset_num_timesteps=False)
    assert checkpoint.num_timesteps >= 140


def test_callbacks_that_stop(tmp_path):
    env = make_vec_env("CartPole-v1", seed=1)
    stop = StopTrainingOnRewardThreshold(reward_threshold=1.0)
    model = make_model().learn(200, callback=EvalCallback(env, callback_on_new_best=stop, eval_freq=40, verbose=0))
    assert model.num_timesteps == 40
    model = make_model(RandomObsEnv()).learn(1000, callback=StopTrainingOnMaxEpisodes(3))
    assert model._episode_num <= 3
    assert model.num_timesteps < 40
    steps = []
    model = make_model().learn(200, callback=lambda locals_, globals_: steps.append(0) or len(steps) < 33)
    assert model.num_timesteps == 33
    model.learn(27, reset_num_timesteps=False)
    assert model.num_timesteps == 60


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_progress_bar(capsys):
    make_model().learn(100, progress_bar=True)
    captured = capsys.readouterr()
    assert "100/100" in captured.out + captured.err


# Logging

TRAIN_KEYS = {
    "train/critic_loss",
    "train/td_error",
    "train/entropy",
    "train/kl_divergence",
    "train/ent_coef",
    "train/kl_coef",
    "train/beta",
    "train/n_frozen_critics",
    "train/oldest_weight",
    "train/learning_rate",
}
COUNTERS = {"train/n_updates", "train/n_policy_updates"}
ROLLOUT_KEYS = {"rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/exploration_rate", "time/fps"}


def test_logged_values_to_files_and_stdout(tmp_path, capsys):
    """All keys under SB3's names in the table, in CSV, JSON and TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = make_model()
    model.set_logger(configure(str(tmp_path), ["stdout", "csv", "json", "tensorboard"]))
    model.learn(300)
    table = capsys.readouterr().out
    for key in TRAIN_KEYS | COUNTERS | ROLLOUT_KEYS:
        assert f" {key.split('/')[1]} " in table

    with open(tmp_path / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() >= TRAIN_KEYS | COUNTERS | ROLLOUT_KEYS
    last = {key: float(value) for key, value in rows[-1].items() if value}
    assert last.keys() >= TRAIN_KEYS | COUNTERS
    assert 0 < last["train/entropy"] <= 1
    assert last["train/kl_divergence"] >= 0
    assert last["train/critic_loss"] > 0
    assert last["train/td_error"] > 0
    assert last["train/ent_coef"] == 0.1
    assert last["train/kl_coef"] == 1.0
    assert last["train/beta"] == pytest.approx(1 / 1.1)
    assert last["train/n_frozen_critics"] == 4
    assert last["train/oldest_weight"] == pytest.approx(1.1**-3)
    assert last["train/n_updates"] == last["time/total_timesteps"] - 20 - 1
    assert last["train/n_policy_updates"] == (last["time/total_timesteps"] - 1 - 20) // 10
    assert last["rollout/exploration_rate"] == 0.05

    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert len(lines) == len(rows)
    assert lines[-1]["train/critic_loss"] == pytest.approx(last["train/critic_loss"])

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= TRAIN_KEYS | ROLLOUT_KEYS
    assert not tags & COUNTERS
    scalars = events.Scalars("train/entropy")
    assert scalars[-1].step == last["time/total_timesteps"]
    assert scalars[-1].value == pytest.approx(last["train/entropy"], rel=1e-5)


def test_tensorboard_folder(tmp_path):
    model = make_model(tensorboard_log=str(tmp_path))
    model.learn(60)
    model.learn(60)
    model.learn(60, tb_log_name="other")
    assert {path.name for path in tmp_path.iterdir()} == {"StaQ_1", "StaQ_2", "other_1"}
    assert all(list(path.glob("events*")) for path in tmp_path.iterdir())


def test_verbosity(capsys):
    make_model(verbose=0).learn(100)
    assert capsys.readouterr().out == ""
    make_model(verbose=1).learn(200)
    out = capsys.readouterr().out
    assert "Using cpu device" in out
    assert "n_frozen_critics" in out


def test_episode_statistics(tmp_path):
    """Monitor's numbers arrive in the logs, for plain and for vectorised environments."""
    for i, env in enumerate([gym.make("CartPole-v1"), VecMonitor(DummyVecEnv([CartPoleEnv] * 2))]):
        model = make_model(env, stats_window_size=5)
        model.set_logger(configure(str(tmp_path / str(i)), ["json"]))
        model.learn(300)
        assert len(model.ep_info_buffer) == 5
        assert all(info["r"] == info["l"] for info in model.ep_info_buffer)
        mean = np.mean([info["r"] for info in model.ep_info_buffer])
        model.dump_logs()
        line = json.loads((tmp_path / str(i) / "progress.json").read_text().splitlines()[-1])
        assert line["rollout/ep_rew_mean"] == pytest.approx(mean)
        assert line["rollout/ep_len_mean"] == pytest.approx(mean)
        assert line["time/total_timesteps"] == 300


@pytest.mark.parametrize("kind", ["box", "image", "dict"])
def test_observations_of_a_wrong_shape(kind):
    """As for every SB3 algorithm, an error that says what was expected."""
    policy = {"box": "MlpPolicy", "image": "CnnPolicy", "dict": "MultiInputPolicy"}[kind]
    model = make_model(RandomObsEnv(kind), policy)
    wrong = np.zeros((3, 5, 7), np.float32)
    with pytest.raises(ValueError, match=r"(?i)unexpected observation shape"):
        model.predict({"a": wrong, "b": np.zeros(3)} if kind == "dict" else wrong)
