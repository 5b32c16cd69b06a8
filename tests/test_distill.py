"""Distillation: the report against brute force, the student as an SB3 policy, and a training that does not notice."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from architectures import NormExtractor
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from helpers import RandomObsEnv, grow, make_model, slow_average, slow_log_policy, slow_logit_sums
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_staq import StaQ, StaQPolicy
from sb3_staq.distill import distill

QUICK = dict(max_steps=40, states_per_round=60, n_eval_episodes=3)


def distillable(kind="box", policy="MlpPolicy", action_space=None, n=5, env=None, **kwargs):
    """A model with replayed states and a stack of different critics."""
    env = RandomObsEnv(kind, action_space=action_space) if env is None else env
    model = make_model(env, policy, learning_starts=100, **kwargs)
    model.learn(40)
    grow(model, n)
    return model


@pytest.mark.parametrize("eval_policy", ["average", "last"])
def test_report_is_true(eval_policy):
    """KL divergence and agreement at the held-out states by brute force, in double precision."""
    model = distillable(action_space=spaces.MultiDiscrete([2, 3]), eval_policy=eval_policy)
    student, report = model.distill(**QUICK)

    stack = model.policy
    sums = slow_average(stack, report.held_out) if eval_policy == "average" else slow_logit_sums(stack, report.held_out)
    factor = stack.frozen_critics.weights.total if eval_policy == "average" else 1.0
    log_p = slow_log_policy(stack, stack.frozen_critics.weights.scale * factor * sums)
    log_q = slow_log_policy(student, student.frozen_critics.weights.scale * slow_logit_sums(student, report.held_out))
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    assert report.kl_mean == pytest.approx(kl.mean().item(), rel=1e-3)
    assert report.kl_max == pytest.approx(kl.max().item(), rel=1e-3)
    same = [(log_p[:, rows].argmax(1) == log_q[:, rows].argmax(1)).float().mean() for rows in (slice(2), slice(2, 5))]
    assert report.agreement == pytest.approx(np.mean(same))


def test_close_to_the_stack():
    """What is asked for is reached, and stops the training before its budget is spent."""
    model = distillable(n=3)
    student, report = model.distill(max_kl=0.02, max_steps=10_000, states_per_round=500, n_eval_episodes=1)
    assert report.reached and report.kl_mean <= 0.02 and report.n_steps < 10_000
    assert "max_kl=0.02 was reached" in str(report)

    obs = np.random.default_rng(0).uniform(-1, 1, (500, 4)).astype(np.float32)  # states of its own
    log_p, log_q = (slow_log_policy(p, p.logits(th.as_tensor(obs)).detach().double()) for p in (model.policy, student))
    assert (log_p.exp() * (log_p - log_q)).sum(dim=1).mean() < 0.05
    same = model.policy.predict(obs, deterministic=True)[0] == student.predict(obs, deterministic=True)[0]
    assert same.mean() == pytest.approx(report.agreement, abs=0.05) and same.mean() > 0.9


def test_numbers_of_the_report():
    """Of the stack, only the critics that act are counted."""
    model = distillable(eval_policy="last", average_window=1.0)
    assert len(model.policy.frozen_critics) > model.memory_size
    _, report = model.distill(**QUICK)
    assert report.stack.n_parameters == model.memory_size * model.n_critics * report.student.n_parameters
    for numbers in (report.stack, report.student):
        assert 0.005 < numbers.ms_per_action < 1000  # milliseconds indeed


def test_spent_budget_is_said():
    _, report = distillable().distill(max_kl=0, **QUICK)
    assert not report.reached and report.n_steps == 40
    assert "max_kl=0 was NOT reached (40 gradient steps" in str(report)


@pytest.mark.parametrize(
    ("kind", "policy", "action_space", "kwargs"),
    [
        ("dict", "MultiInputPolicy", spaces.MultiBinary([2, 2]), {}),
        ("discrete", "MlpPolicy", spaces.Box(-2, 3, (2,)), dict(critic="joint")),
        ("image", "CnnPolicy", spaces.Box(-2, 3, (2,)), dict(action_grid="axis")),
    ],
)
def test_student_is_an_sb3_policy(kind, policy, action_space, kwargs, tmp_path):
    """One critic, with the architecture of those of the stack; it acts, evaluates, saves and loads."""
    model = distillable(kind, policy, action_space, n=2, **kwargs)
    student, report = model.distill(**QUICK)
    assert type(student) is type(model.policy)
    assert len(student.frozen_critics) == 1 and student.n_critics == 1
    shapes = [list(param.shape[1:]) for param in model.policy.frozen_critics[0].params.values()]
    own_shapes = [list(param.shape[1:]) for param in student.frozen_critics[0].params.values()]
    assert own_shapes[:-2] == shapes[:-2]  # the output layer may have a value of the state as well
    assert report.student.n_parameters == sum(int(np.prod(shape)) for shape in own_shapes)

    student.save(tmp_path / "student.pth")
    assert report.student.n_bytes == pytest.approx((tmp_path / "student.pth").stat().st_size, rel=0.05)
    loaded = type(student).load(tmp_path / "student.pth")
    env = model.get_env()
    obs = env.reset()
    np.testing.assert_array_equal(
        loaded.predict(obs, deterministic=True)[0], student.predict(obs, deterministic=True)[0]
    )
    assert all(action_space.contains(action) for action in student.predict(obs)[0])
    assert np.isfinite(evaluate_policy(loaded, env, 2)[0])


def test_other_classes_bring_their_own_arguments():
    policy_kwargs = dict(features_extractor_class=NormExtractor, features_extractor_kwargs=dict(features_dim=6))
    model = distillable(policy_kwargs=policy_kwargs)
    assert "fused" in model.policy.optimizer_kwargs
    other = dict(features_extractor_class=FlattenExtractor, optimizer_class=th.optim.RMSprop, net_arch=[8])
    student, _ = model.distill(policy_kwargs=other, **QUICK)
    assert isinstance(student.optimizer, th.optim.RMSprop)
    assert isinstance(student.critics.net.features_extractor, FlattenExtractor)


def test_architecture():
    student, report = distillable().distill(policy_kwargs=dict(net_arch=[8, 4], activation_fn=th.nn.Tanh), **QUICK)
    assert report.student.n_parameters == (4 * 8 + 8) + (8 * 4 + 4) + (4 * 3 + 3)
    assert any(isinstance(layer, th.nn.Tanh) for layer in student.modules())


@pytest.mark.parametrize("rule", [[3.0, 2.0, 1.0], "exact"], ids=str)
def test_students_of_other_rules(rule):
    """Their single critic needs neither the weights nor the memory of the stack."""
    model = distillable(n=4, logit_rule=rule, memory_size=3)
    student, report = model.distill(**QUICK)
    assert report.n_steps == 40 and len(student.frozen_critics) == 1


def test_training_does_not_notice():
    """Random numbers, parameters and normalisation go on as if nothing had happened."""

    def trained(distilled):
        env = VecNormalize(DummyVecEnv([RandomObsEnv, RandomObsEnv]), clip_obs=2.0)
        model = make_model(env)
        model.learn(60)
        if distilled:
            other = VecNormalize(DummyVecEnv([RandomObsEnv]), norm_reward=False)
            model.distill(env=other, **QUICK)
        model.learn(40, reset_num_timesteps=False)
        return model, env

    (model, env), (other, other_env) = trained(False), trained(True)
    assert env.training and other_env.training and other_env.norm_reward
    np.testing.assert_array_equal(env.obs_rms.mean, other_env.obs_rms.mean)
    assert all(th.equal(a, b) for a, b in zip(model.policy.parameters(), other.policy.parameters(), strict=True))


def test_own_environment_is_left_ready():
    """The training goes on with a new episode: what the environment returns next belongs to what is remembered."""
    model = distillable()
    model.distill(**QUICK)
    first = []
    env, buffer = model.env.envs[0].unwrapped, model.replay_buffer
    env.reset = lambda **kwargs: first.append(RandomObsEnv.reset(env, **kwargs)[0]) or (first[-1], {})
    model.learn(1, reset_num_timesteps=False)
    np.testing.assert_array_equal(buffer.observations[buffer.pos - 1][0], first[0])
    np.testing.assert_array_equal(buffer.next_observations[buffer.pos - 1][0], env._last)


@pytest.mark.parametrize(("kind", "policy"), [("box", "MlpPolicy"), ("image", "CnnPolicy")])
@pytest.mark.parametrize("n_envs", [None, 2])
def test_own_environment_is_recognised(kind, policy, n_envs):
    """As it was passed to the model: without the wrappers that SB3 puts around it."""
    env = RandomObsEnv(kind) if n_envs is None else DummyVecEnv([lambda: RandomObsEnv(kind)] * n_envs)
    policy_kwargs = dict(features_extractor_kwargs=dict(features_dim=8)) if kind == "image" else {}
    model = make_model(env, policy, (), policy_kwargs).learn(60)
    model.distill(env=env, **QUICK)
    assert model._last_obs is None
    model.distill(env=RandomObsEnv(kind), **QUICK)
    model.learn(10, reset_num_timesteps=False)
    model.distill(env=RandomObsEnv(kind), **QUICK)
    assert model._last_obs is not None


def test_training_meets_new_episodes():
    """Its environment does not begin the same episodes after each distillation."""
    model, starts = distillable(), []
    buffer = model.replay_buffer
    for _ in range(3):
        model.distill(**QUICK)
        model.learn(3, reset_num_timesteps=False)
        starts.append(buffer.observations[buffer.pos - 3 : buffer.pos, 0].tolist())
    assert starts[0] != starts[1] != starts[2] != starts[0]


class Shifted(RandomObsEnv):
    """Raw observations around 100."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Box(99, 101, (4,), np.float32)


def test_states_are_normalised(tmp_path):
    """With the statistics of the environment that is given, if the model has none."""
    env = VecNormalize(DummyVecEnv([Shifted]))
    model = make_model(env, learning_starts=100)
    model.learn(200)
    grow(model, 3)
    model.save(tmp_path / "model")
    loaded = StaQ.load(tmp_path / "model")
    loaded.replay_buffer = model.replay_buffer
    for distilled, where in ((model, {}), (loaded, dict(env=env))):
        _, report = distilled.distill(**QUICK, **where)
        assert report.held_out.abs().max() < 5 and len(report.held_out) >= 10


def test_given_environment_normalises_as_in_training():
    """During distillation only: then its own statistics and limits are back."""
    model = make_model(VecNormalize(DummyVecEnv([Shifted]), clip_obs=0.5, epsilon=3.0), learning_starts=100)
    model.learn(60)
    grow(model, 3)
    model.replay_buffer.reset()
    other = VecNormalize(DummyVecEnv([Shifted]))
    statistics, mean = other.obs_rms, other.obs_rms.mean.copy()
    _, report = model.distill(env=other, **QUICK)
    assert report.held_out.abs().max() == 0.5 and report.held_out.mean().abs() < 0.2
    assert (report.held_out.abs() == 0.5).float().mean() < 0.3  # with the usual epsilon, most would be clipped
    assert other.obs_rms is statistics and (other.clip_obs, other.epsilon) == (10, 1e-8)
    assert other.training and other.norm_reward
    np.testing.assert_array_equal(statistics.mean, mean)


def test_discrete_part_of_a_dict():
    """As in MiniGrid, where it comes first: the states are those of the replay."""

    class DiscreteFirst(RandomObsEnv):
        def __init__(self):
            super().__init__("dict")
            self.observation_space = spaces.Dict(b=spaces.Discrete(5), a=spaces.Box(-1, 1, (3,), np.float32))

    model = make_model(DiscreteFirst(), "MultiInputPolicy", learning_starts=100)
    model.learn(40)
    grow(model, 3)
    model.env = None
    _, report = model.distill(**QUICK)

    def rows(obs, n):
        return {(*a, b) for a, b in zip(obs["a"].reshape(n, 3).tolist(), obs["b"].reshape(n).tolist(), strict=True)}

    stored = {key: x[:40] for key, x in model.replay_buffer.observations.items()}
    n = len(report.held_out["b"])
    assert n > 0 and rows(report.held_out, n) < rows(stored, 40)


def test_student_visits_states_in_both_ways(monkeypatch):
    """The stack acts in the first round, then the student; deterministically in every other round."""
    acts, predict = [], StaQPolicy.predict

    def record(policy, obs, deterministic=False, **kwargs):
        acts.append((policy, deterministic))
        return predict(policy, obs, deterministic=deterministic, **kwargs)

    model = distillable()
    monkeypatch.setattr("sb3_staq.distill.STEPS_PER_ROUND", 10)
    monkeypatch.setattr(StaQPolicy, "predict", record)
    student, _ = model.distill(**{**QUICK, "n_eval_episodes": 1, "max_kl": 0.0})
    rounds = [acts[60 * i] for i in range(4)]
    assert [policy is model.policy for policy, _ in rounds] == [True, False, False, False]
    assert all(policy is student for policy, _ in rounds[1:])
    assert [deterministic for _, deterministic in rounds] == [False, True, False, True]


def test_returns_are_of_the_same_seeds():
    """By plain Gymnasium, episode by episode."""
    model = make_model("CartPole-v1")
    grow(model, 3)
    student, report = model.distill(**{**QUICK, "seed": 7, "n_eval_episodes": 4})
    env = gym.make("CartPole-v1")
    for policy, returns in ((model.policy, report.stack.returns), (student, report.student.returns)):
        for i in range(4):
            obs, _ = env.reset(seed=7 + i)
            total, done = 0.0, False
            while not done:
                obs, reward, terminated, truncated, _ = env.step(int(policy.predict(obs, deterministic=True)[0]))
                total, done = total + reward, terminated or truncated
            assert returns[i] == total


def test_returns_are_not_normalised():
    """The reward of a step is 0 or 1."""
    model = distillable(env=VecNormalize(DummyVecEnv([RandomObsEnv] * 2)))
    _, report = model.distill(**QUICK)
    for returns in (report.stack.returns, report.student.returns):
        assert len(returns) == 3 and all(value == round(value) for value in returns)


def test_same_seed_same_student():
    students = [distillable().distill(**QUICK)[0] for _ in range(2)]
    assert all(th.equal(a, b) for a, b in zip(*(student.parameters() for student in students), strict=True))


def test_environments_made_from_an_id_are_closed(monkeypatch):
    closed = []
    monkeypatch.setattr(CartPoleEnv, "close", lambda self: closed.append(self))
    model = make_model("CartPole-v1")
    grow(model, 3)
    model.distill(**QUICK)
    assert not closed  # the model's own
    model.distill(env="CartPole-v1", **QUICK)
    assert len(closed) == 1


def test_same_seed_same_report():
    """Also if neither the model nor the environment has a seed."""
    model = make_model("CartPole-v1", seed=None)
    grow(model, 3)
    first, second = (model.distill(env="CartPole-v1", **QUICK)[1] for _ in range(2))
    assert th.equal(first.held_out, second.held_out)
    assert (first.kl_mean, first.stack.returns) == (second.kl_mean, second.stack.returns)


def test_replay_without_environment(tmp_path):
    model = distillable()
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "replay.pkl")
    loaded = type(model).load(tmp_path / "model.zip")
    with pytest.raises(ValueError, match="Invalid env=None"):
        loaded.distill(**QUICK)
    loaded.load_replay_buffer(tmp_path / "replay.pkl")
    student, report = loaded.distill(**QUICK)
    assert report.student.returns == [] and isinstance(student, StaQPolicy)
    assert report.n_states + len(report.held_out) == 40  # each of them once

    loaded.replay_buffer.pos = 1
    with pytest.raises(ValueError, match=r"Invalid env=None.* neither one nor two replayed states"):
        loaded.distill(**QUICK)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_kl", -1),
        ("max_steps", 0),
        ("states_per_round", 1.5),
        ("n_eval_episodes", 0),
        ("seed", None),
        ("seed", 2**32),
        ("policy_kwargs", dict(memory_size=3)),
        ("policy_kwargs", 3),
    ],
)
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"Invalid {name}="):
        distill(make_model(), **{name: value})


def test_not_in_the_environment_of_a_running_training():
    class Distill(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 100:
                with pytest.raises(ValueError, match=r"Invalid env=None: expected another environment"):
                    self.model.distill()
                self.model.distill(env=RandomObsEnv(), max_steps=10, n_eval_episodes=1)
            return True

    make_model(RandomObsEnv()).learn(200, callback=Distill())


def test_bad_models_and_environments():
    with pytest.raises(ValueError, match=r"Invalid model=.*: expected one with at least one policy update"):
        make_model().distill()
    with pytest.raises(ValueError, match="spaces do not match"):
        distillable().distill(env="CartPole-v1")
    model = make_model(VecNormalize(DummyVecEnv([RandomObsEnv])))
    grow(model, 1)
    with pytest.raises(ValueError, match=r"Invalid env=.*: expected one in VecNormalize"):
        model.distill(env=RandomObsEnv())
