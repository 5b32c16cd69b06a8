"""The algorithm: targets, losses and policy updates against the formulas of the paper, written down by hand."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    OneStateEnv,
    RandomObsEnv,
    by_age,
    grow,
    make_model,
    members,
    randomise,
    relative_error,
    sample_obs,
    slow_log_policy,
    slow_q_values,
)
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

# The training by hand


def parts_of(samples, batch_size):
    """Samples of SB3's replay buffer in batches."""

    def rows(value, part):
        if isinstance(value, dict):
            return {key: x[part] for key, x in value.items()}
        return None if value is None else value[part]

    for start in range(0, len(samples.rewards), batch_size):
        part = slice(start, start + batch_size)
        yield SimpleNamespace(**{name: rows(value, part) for name, value in samples._asdict().items()})


def prepared_model(env, n_collected=150, **kwargs):
    """Random critics, targets and stack, and transitions; nothing trained yet."""
    model = make_model(env, **{"average_window": 0.01, **kwargs, "learning_starts": 10**6})
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
            bins = [int(np.abs(values - a.item()).argmin()) for a in action]
        else:
            start = space.start if isinstance(space, spaces.Discrete) else 0
            bins = [int(a) - int(start) for a in action]
        return [columns[i] for columns, i in zip(self.columns, bins, strict=True)]

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
    samples = model.replay_buffer.sample(4 * 32, env=model.get_vec_normalize_env())
    assert (type(model.replay_buffer) is NStepReplayBuffer) == (case == "n_step")
    assert 0 < samples.dones.sum().item() < 100
    losses = [by_hand.gradient_step(batch)[0] for batch in parts_of(samples, 32)]
    by_hand.assert_same()
    changes = [a - b for a, b in zip(model.policy.critics.parameters(), before, strict=True)]
    assert all(change.abs().max() > 1e-4 for change in changes)
    assert model.logger.name_to_value["train/critic_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert model._n_updates == 4
    assert model.n_policy_updates == 5  # those of the stack that was made: none in `train`


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
    model._steps_since_train = 30
    by_hand, losses = ByHand(model), []
    model.train(gradient_steps=9, batch_size=4)
    batch = model.replay_buffer.sample(4)
    for _ in range(3):
        losses += [by_hand.gradient_step(batch)[0] for _ in range(3)]
        old_log_pi = by_hand.log_policy(batch.next_observations)
        by_hand.policy_update()
    by_hand.assert_same(rtol=1e-4)
    assert len(model.policy.frozen_critics.weights) == len(by_hand.stack) == 6
    obs = th.randn(10, 4, generator=th.Generator().manual_seed(0))
    th.testing.assert_close(
        slow_log_policy(model.policy, model.policy.logits(obs)), by_hand.log_policy(obs), rtol=1e-3, atol=1e-4
    )
    # What is logged is about the last update, but the loss is the mean over all gradient steps
    log_pi = by_hand.log_policy(batch.next_observations)
    logged = model.logger.name_to_value
    assert logged["train/critic_loss"] == pytest.approx(np.mean(losses), rel=1e-3)
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
        betas = ()

        def _on_step(self):
            return True

        def _on_rollout_start(self):
            model = self.model
            if model.n_policy_updates == len(self.betas):
                return
            progress = 1 - model.num_timesteps / 200
            logged = model.logger.name_to_value
            ent, kl = ent_at(progress), kl_at(progress)
            assert logged["train/ent_coef"] == pytest.approx(ent)
            assert logged["train/kl_coef"] == pytest.approx(kl)
            assert logged["train/beta"] == pytest.approx(kl / (kl + ent))
            self.betas = (*self.betas, kl / (kl + ent))
            # Those since the push of the oldest critic, once the stack is full
            oldest_weight = np.prod(self.betas[-3:]) if len(self.betas) >= 4 else 0.0
            assert logged["train/oldest_weight"] == pytest.approx(oldest_weight)
            weights = model.policy.frozen_critics.weights
            assert weights.scale == pytest.approx(1 / (kl + ent) / (1 - (kl / (kl + ent)) ** 4))
            if len(self.betas) > 1:
                assert weights.values[-2] == pytest.approx(kl / (kl + ent))

    callback = Watch()
    make_model(ent_coef=ent_coef, kl_coef=kl_coef).learn(200, callback=callback, log_interval=None)
    assert len(callback.betas) >= 17


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
    newest_first = [slow_q_values(entry, obs) for entry in by_age(model.policy)[::-1]]
    expected = sum(weight * q for weight, q in zip([3.0, 2.0, -1.0, 0.5], newest_first, strict=True))
    assert relative_error(model.policy.logits(obs), expected) < 1e-5
    with pytest.raises(ValueError, match=r"Invalid logit_cache=True: .*logit_rule=\(3.0, .*expected 'auto' or False"):
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
    assert model.n_policy_updates == 5 + 1


def test_before_the_first_policy_update_the_coefficient_is_the_first_of_the_schedule():
    """However far the training is: the targets belong to a policy, which has not changed yet."""
    model = make_model(RandomObsEnv(), ent_coef="lin_1.0", policy_update_interval=10**6).learn(60)
    assert model._current_progress_remaining == 0
    assert model._current_ent_coef == 1.0


def test_learning_rate_schedule():
    model = make_model(learning_rate=lambda progress: 0.01 * progress)
    model.learn(100, log_interval=None)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    assert model.logger.name_to_value["train/learning_rate"] == pytest.approx(0.0, abs=1e-9)
    model = make_model(learning_rate=0.0)
    model.learn(60)
    assert (model.policy.critics.net.q_net[-1].weight == 0).all()


# The policy update as it was published, and with changing coefficients


class Published:
    """
    The logits over the critics Q_0, Q_1, ... that were pushed, in double precision, by the rules of the paper for
    constant coefficients. If they change, the alpha = 1 / (kl_coef + ent_coef) of the last update scales the whole sum:
    the weight of Q_i is this alpha times the product of the betas since; the newest M count. The correction divides
    by 1 - beta^M, with the last beta.
    """

    def __init__(self, rule, memory_size):
        self.rule, self.memory_size, self.pushed = rule, memory_size, []

    def push(self, q_values, kl_coef, ent_coef):
        self.pushed.append((q_values, kl_coef, ent_coef))

    def logits(self):
        first = 0 if self.rule == "exact" else max(0, len(self.pushed) - self.memory_size)
        _, kl_coef, ent_coef = self.pushed[-1]
        total = 0.0
        for i in range(first, len(self.pushed)):
            betas = [kl / (kl + ent) for _, kl, ent in self.pushed[i + 1 :]]
            total = total + np.prod(betas) * self.pushed[i][0].numpy()
        if self.rule == "weight_corrected":
            total = total / (1 - (kl_coef / (kl_coef + ent_coef)) ** self.memory_size)
        return th.as_tensor(total / (kl_coef + ent_coef))


@pytest.mark.parametrize("rule", ["weight_corrected", "truncated", "exact"])
@pytest.mark.parametrize("memory_size", [1, 2, 7])
@pytest.mark.parametrize("logit_cache", [True, False])
def test_training_follows_the_published_rule(rule, memory_size, logit_cache):
    """With changing coefficients, the policy after each update is that of the critics that were pushed so far."""
    model = make_model(
        RandomObsEnv(action_space=spaces.MultiDiscrete([2, 3])),
        logit_rule=rule,
        memory_size=memory_size,
        logit_cache=logit_cache,
        kl_coef=lambda progress: 0.5 + 2 * progress**2,
        ent_coef="lin_0.6_0.1",
    )
    obs = sample_obs(model.observation_space, 30)
    published, errors = Published(rule, memory_size), []

    def compare(info):
        progress = 1 - model.num_timesteps / 130
        assert info.kl_coef == pytest.approx(0.5 + 2 * progress**2)
        assert info.ent_coef == pytest.approx(0.1 + 0.5 * progress)
        assert len(info.deleted) == (rule != "exact" and model.n_policy_updates > memory_size)
        published.push(slow_q_values(model.policy.critics, obs), info.kl_coef, info.ent_coef)
        expected = published.logits()
        errors.append(relative_error(model.policy.logits(obs), expected))
        sums = model.replay.logit_sums(obs, remember=False)
        errors.append(relative_error(model.policy.log_prob(sums), slow_log_policy(model.policy, expected)))

    class Compare(BaseCallback):
        def _on_training_start(self):
            model.policy_update_hooks.append(compare)

        def _on_step(self):
            return True

    model.learn(130, callback=Compare())
    assert model.n_policy_updates == len(published.pushed) == 11
    assert max(errors) < 1e-4


def test_update_is_the_maximiser_of_the_regularised_problem():
    """With the exact rule, no other policy has a larger E[Q] - ent_coef h - kl_coef KL."""
    model = make_model(RandomObsEnv(), logit_rule="exact")
    grow(model, 3)
    obs, policy = sample_obs(model.observation_space, 30), model.policy
    old = policy.log_prob(policy.logit_sums(obs)).double()
    randomise(policy.critics, 50)
    q_values = slow_q_values(policy.critics, obs)
    policy.push_critics(0.8, 0.3)
    new = policy.log_prob(policy.logit_sums(obs)).double()

    def objective(log_pi):
        pi = log_pi.exp()
        return (pi * (q_values - 0.3 * log_pi - 0.8 * (log_pi - old))).sum(-1)

    generator = th.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0):
        for _ in range(20):
            other = (new + size * th.randn(new.shape, generator=generator, dtype=th.float64)).log_softmax(-1)
            assert (objective(other) <= objective(new) + 1e-6).all()
    # Its value in closed form: (kl_coef + ent_coef) log sum exp((Q + kl_coef log pi_k) / (kl_coef + ent_coef))
    best = 1.1 * ((q_values + 0.8 * old) / 1.1).logsumexp(-1)
    th.testing.assert_close(objective(new), best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("logit_cache", [True, False])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_targets_in_double_precision(n_steps, logit_cache, monkeypatch):
    """
    The losses from the targets, transition by transition, of what is stored: y = r + gamma (1 - d) V(s'), or the sum
    of the next three rewards up to the end of the episode and gamma^n V of the state after them.
    """
    env = RandomObsEnv(action_space=spaces.MultiDiscrete([2, 3]))
    model = prepared_model(env, n_steps=n_steps, ent_coef=0.7, gamma=0.9, logit_cache=logit_cache, learning_rate=0.0)
    by_hand, policy, buffer = ByHand(model), model.policy, model.replay_buffer
    rows = {row.tobytes(): i for i, row in enumerate(buffer.observations[:150, 0])}
    seen = []
    action_values = policy.action_values

    def note(obs, actions):
        values = action_values(obs, actions)
        seen.append((obs, values.detach()))
        return values

    monkeypatch.setattr(policy, "action_values", note)
    model.train(gradient_steps=1, batch_size=64)
    (obs, values), *_ = seen
    targets = []
    for row in (rows[x.numpy().tobytes()] for x in obs):
        reward, discount = 0.0, 1.0
        for step in range(n_steps):
            i = row + step
            reward += discount * buffer.rewards[i, 0]
            discount *= 0.9
            ends = buffer.dones[i, 0] or i == 149
            if ends:
                break
        next_obs = th.as_tensor(buffer.next_observations[i])
        log_pi = by_hand.log_policy(next_obs).double()[0]
        q_next = slow_q_values(policy.critics_target, next_obs)[0]
        value = sum((log_pi[c].exp() * (q_next[c] - 0.7 * log_pi[c])).sum() for c in by_hand.columns)
        bootstraps = not buffer.dones[i, 0] or buffer.timeouts[i, 0]
        targets.append(reward + (discount * value.item() if bootstraps else 0.0))
    errors = values.double() - th.tensor(targets, dtype=th.float64)
    logged = model.logger.name_to_value
    assert logged["train/critic_loss"] == pytest.approx(errors.square().mean(1).sum().item(), rel=1e-4)
    assert logged["train/td_error"] == pytest.approx(errors.abs().mean().item(), rel=1e-4)


@pytest.mark.parametrize("method", ["learn", "train", "distill"])
def test_ctrl_c_while_no_grad_ends(method, monkeypatch):
    """Gradients are on again afterwards, so that learning goes on, and whatever else the process trains."""
    model = make_model(RandomObsEnv(), learning_starts=20).learn(100)
    arguments = dict(learn=dict(total_timesteps=50), train=dict(gradient_steps=20), distill=dict(max_steps=20))

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(th.no_grad, "__exit__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(model, method)(**arguments[method])
    monkeypatch.undo()
    assert th.is_grad_enabled()
    before = copy.deepcopy(model.policy.critics.state_dict())
    model.learn(50, reset_num_timesteps=False)
    assert any(not th.equal(before[name], value) for name, value in model.policy.critics.state_dict().items())
