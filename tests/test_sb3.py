"""The algorithm as a member of Stable-Baselines3: spaces, environments, policies, callbacks, logging, seeding."""

import copy
import csv
import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from helpers import RandomObsEnv, make_model, members
from stable_baselines3 import HerReplayBuffer
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
    assert model.n_policy_updates == n_policy_updates
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
        DummyVecEnv([lambda: copy.deepcopy(env)] * 2),
        "MultiInputPolicy",
        policy_kwargs=kwargs,
        train_freq=5,
        gradient_steps=2,
        batch_size=4,
    )
    assert type(model.policy) is MultiInputPolicy
    model.learn(40)
    assert_trained(model, 40, 2)
    evaluate_policy(model, Monitor(env), n_eval_episodes=1, warn=False)


@pytest.mark.parametrize(("obs_kind", "n_envs"), [("bits", 1), ("bits", 2), ("discrete", 1), ("image", 2)])
def test_hindsight_experience_replay(obs_kind, n_envs):
    kwargs = dict(n_bits=4, discrete_obs_space=obs_kind == "discrete", image_obs_space=obs_kind == "image")
    model = make_model(
        make_vec_env(BitFlippingEnv, n_envs=n_envs, env_kwargs=kwargs),
        "MultiInputPolicy",
        policy_kwargs=dict(features_extractor_kwargs=dict(cnn_output_dim=8)),
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=dict(n_sampled_goal=2, goal_selection_strategy="future"),
        train_freq=5,
        gradient_steps=2,
        batch_size=4,
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
    assert 0.6 < np.mean(shares) < 0.8001


class CountedEpisodes(BitFlippingEnv):
    """Achieves the number of the episode."""

    n_episodes = 0

    def reset(self, **kwargs):
        self.n_episodes += 1
        return super().reset(**kwargs)

    def _get_obs(self):
        number = np.array([self.n_episodes >> i & 1 for i in range(8)], dtype=np.int8)
        return {**super()._get_obs(), "achieved_goal": number}


@pytest.mark.parametrize("n_envs", [1, 3])
def test_no_goal_of_another_episode(n_envs):
    """Also where `learn` begins anew within an episode."""
    model = make_model(
        make_vec_env(CountedEpisodes, n_envs, env_kwargs=dict(n_bits=8, max_steps=9)),
        "MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=dict(n_sampled_goal=4, goal_selection_strategy="final"),
        learning_starts=10 * n_envs,
    )
    for n in (30, 100, 50):
        model.learn(n * n_envs)
    model.set_env(make_vec_env(CountedEpisodes, n_envs, env_kwargs=dict(n_bits=8, max_steps=9)))
    model.learn(50 * n_envs, reset_num_timesteps=False)
    real_goals = {tuple(goal) for goal in model.replay_buffer.observations["desired_goal"].reshape(-1, 8)}
    obs = model.replay_buffer.sample(2000).observations
    relabelled = map(tuple, obs["desired_goal"].int().tolist())
    achieved = map(tuple, obs["achieved_goal"].int().tolist())
    wrong = [goal not in (own, *real_goals) for goal, own in zip(relabelled, achieved, strict=True)]
    assert not any(wrong)


@pytest.mark.slow
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
    kl_coef=0.5,
    ent_coef=0.05,
    policy_update_interval=500,
    critic="additive",
    critic_reduction="mean",
    exploration_initial_eps=0.05,
    exploration_final_eps=0.05,
)
FACTORED_BOX = dict(
    learning_rate=7e-4,
    batch_size=128,
    tau=0.01,
    kl_coef="rel_0.5",
    ent_coef="auto_0.2",
    policy_update_interval=100,
    critic="joint",
    critic_reduction="min",
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
    """The environment and the replay buffer get the space's actions; the right bin is learned."""
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
    events = "tensorboard.backend.event_processing.event_accumulator"
    EventAccumulator = pytest.importorskip(events, reason="needs TensorBoard").EventAccumulator

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
    pytest.importorskip("tensorboard", reason="needs TensorBoard")
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
