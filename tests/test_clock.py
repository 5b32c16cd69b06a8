"""When policy updates come, and what is changed while a model learns."""

import copy
import gc
import itertools

import numpy as np
import pytest
import torch as th
from helpers import RandomObsEnv, by_age, make_model, relative_error, slow_logit_sums
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_staq import StaQ

# When policy updates come


class UpdateSteps(BaseCallback):
    """The time steps after which policy updates were done, and the gradient steps done by then."""

    def _on_training_start(self):
        self.updates = []

    def _note(self):
        new = self.model.n_policy_updates - len(self.updates)
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
    assert model.n_policy_updates == (rollout_ends[-1] - learning_starts) // interval
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
    assert model.n_policy_updates == 2 * 4
    values = [entry.net.q_net[-1].bias.clone() for entry in by_age(model.policy)]
    assert not any(th.equal(a, b) for a, b in itertools.pairwise(values))
    model.policy_update_interval = 1000
    model.learn(60, reset_num_timesteps=False)
    assert model.n_policy_updates == 2 * 4


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
    assert (model._n_updates, model.n_policy_updates, model.replay_buffer.pos) == (0, 0, 60)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("interval", [10, 7])
def test_steps_of_several_calls_of_learn_add_up(n_envs, interval):
    """
    However short the pieces, with the counters reset or not: one update per interval of steps in which something was
    learnt. ``learning_starts`` counts in each call that resets the counters.
    """
    env = DummyVecEnv([RandomObsEnv] * n_envs)
    model = make_model(env, policy_update_interval=interval, learning_starts=9, memory_size=1000, batch_size=4)
    steps = 0  # that count
    for n_pieces, reset in [(4, True), (6, False), (3, True)]:
        for _ in range(n_pieces):
            before = 0 if reset else model.num_timesteps
            model.learn(13, reset_num_timesteps=reset)
            for now in range(before + n_envs, model.num_timesteps + 1, n_envs):
                steps += min(n_envs, max(0, now - 9))
            assert model.n_policy_updates == steps // interval
    assert len(model.policy.frozen_critics.weights) == model.n_policy_updates >= 9


def test_counters_go_on_after_a_second_learn():
    """With a reset the steps up to ``learning_starts`` do not count again; what was left of an interval does."""
    model = make_model().learn(57)
    assert model.n_policy_updates == 3  # at 30, 40, 50; 7 steps are left
    model.learn(5, reset_num_timesteps=False)
    assert model.n_policy_updates == 4  # at 60
    model.learn(45)
    assert model.n_policy_updates == 6  # 2 + 25 steps
    model.learn(20, reset_num_timesteps=False)
    assert model.n_policy_updates == 8  # 7 + 20


def test_saved_counters(tmp_path):
    """A model that is saved between two updates does the next one when the one that went on does."""
    times = []
    for saved in (False, True):
        model = make_model(RandomObsEnv(), policy_update_interval=30).learn(71)
        if saved:
            model.save(tmp_path / "model")
            model.save_replay_buffer(tmp_path / "buffer")
            model = StaQ.load(tmp_path / "model", env=RandomObsEnv())
            model.load_replay_buffer(tmp_path / "buffer")
        assert model.n_policy_updates == 1
        callback = UpdateSteps()
        model.learn(60, callback=callback, reset_num_timesteps=False)
        times.append([step for step, _ in callback.updates])
    assert times[0] == times[1] == [71, 80, 110]  # the first that was there at the start


@pytest.mark.parametrize("where", ["before", "after"])
def test_interrupted_policy_update(where):
    """One that has not happened is still due, one that has happened is not; the next comes when it would have come."""
    model = make_model(RandomObsEnv())
    original, calls = model.policy.push_critics, []

    def push_critics(*args):
        calls.append(args)
        if len(calls) == 2 and where == "before":
            raise KeyboardInterrupt
        result = original(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return result

    model.policy.push_critics = push_critics
    with pytest.raises(KeyboardInterrupt):
        model.learn(100)
    assert (model.num_timesteps, model.n_policy_updates) == (40, 1 if where == "before" else 2)
    callback = UpdateSteps()
    model.learn(25, callback=callback, reset_num_timesteps=False)
    now = [41] if where == "before" else []
    assert [step for step, _ in callback.updates[-2 - len(now) :]] == [*now, 50, 60]


def filled_model(n_envs=1, **kwargs):
    """A model with a replay buffer that was filled by hand, and no step of its own."""
    model = make_model(DummyVecEnv([RandomObsEnv] * n_envs), memory_size=1000, **kwargs)
    generator = np.random.default_rng(0)
    for _ in range(100):
        obs, next_obs = generator.uniform(-1, 1, (2, n_envs, 4)).astype(np.float32)
        action = generator.integers(3, size=(n_envs, 1))
        model.replay_buffer.add(obs, next_obs, action, generator.normal(size=n_envs), np.zeros(n_envs), [{}] * n_envs)
    return model


@pytest.mark.parametrize(
    ("kwargs", "per_update"),
    [
        (dict(gradient_steps=-1, train_freq=4), 20),
        (dict(gradient_steps=1, train_freq=4), 5),
        (dict(gradient_steps=6, train_freq=3), 40),
        (dict(gradient_steps=3, train_freq=4), 15),
        (dict(gradient_steps=6, train_freq=3, n_envs=2), 20),
        (dict(gradient_steps=5, train_freq=(1, "episode")), 20),  # not known beforehand
    ],
)
@pytest.mark.parametrize("pieces", [1, 7, 60])
def test_training_without_steps_at_the_ratio_of_learn(kwargs, per_update, pieces):
    """An interval is 20 environment steps: as many gradient steps as ``learn`` would do meanwhile."""
    model = filled_model(policy_update_interval=20, **kwargs)
    done = 0
    while done < 240:
        model.train(gradient_steps=pieces, batch_size=4)
        done += pieces
        # A number that is no sum of powers of two may come one gradient step late
        assert done // per_update - (done % per_update == 0 and pieces == 1) <= model.n_policy_updates
        assert model.n_policy_updates <= done // per_update
    assert model._n_updates == done
    assert model.policy.logits(th.ones(1, 4)).abs().max() > 0


def test_memory_of_many_gradient_steps():
    """A long offline training keeps nothing of each step."""
    model, n_tensors = filled_model(policy_update_interval=1000), {}

    def count(*_):
        if model._n_updates in (5, 59):
            n_tensors[model._n_updates] = sum(type(x) is th.Tensor for x in gc.get_objects())

    model.policy.optimizer.register_step_post_hook(count)
    model.train(gradient_steps=60, batch_size=4)
    assert n_tensors[59] <= n_tensors[5]


def test_policy_updates_by_hand():
    """``update_policy`` does one more, freezing the critics as they are; the pace of the others stays."""
    model = make_model(RandomObsEnv(), memory_size=1000).learn(75)
    assert model.n_policy_updates == 5
    model.update_policy()
    assert model.n_policy_updates == 6
    newest, last = by_age(model.policy)[-1], model.policy.critics
    assert all(th.equal(a, b) for a, b in zip(newest.parameters(), last.parameters(), strict=True))
    obs = model.replay.sample(64).next_observations
    assert relative_error(model.replay.logit_sums(obs), slow_logit_sums(model.policy, obs)) < 1e-5
    model.learn(4, reset_num_timesteps=False)
    assert model.n_policy_updates == 6
    model.learn(1, reset_num_timesteps=False)
    assert model.n_policy_updates == 7


@pytest.mark.parametrize(("name", "value"), [("memory_size", 0), ("n_critics", 3)])
def test_policy_updates_by_hand_refuse_invalid_changes(name, value):
    model = make_model(RandomObsEnv()).learn(65)
    n_updates = model.n_policy_updates
    setattr(model, name, value)
    with pytest.raises(ValueError, match=f"Invalid {name}={value}"):
        model.update_policy()
    assert model.n_policy_updates == n_updates


def test_own_pace_without_steps():
    """Offline: an interval that never ends, and updates whenever the user calls for one."""
    model = filled_model(policy_update_interval=10**9)
    for n in range(1, 4):
        model.train(gradient_steps=10, batch_size=8)
        model.update_policy()
        assert len(model.policy.frozen_critics.weights) == model.n_policy_updates == n
    entries = [th.cat([param.ravel() for param in entry.parameters()]) for entry in by_age(model.policy)]
    assert not any(th.equal(*pair) for pair in itertools.combinations(entries, 2))


# What is set on a model that learns


class SetAt(BaseCallback):
    """Set attributes of the model at some step; note what each policy update logs."""

    def __init__(self, step, **values):
        super().__init__()
        self.step, self.values, self.logged = step, values, []

    def _on_training_start(self):
        self.model.policy_update_hooks.append(lambda info: self.logged.append(dict(self.model.logger.name_to_value)))

    def _on_step(self):
        if self.num_timesteps == self.step:
            for name, value in self.values.items():
                setattr(self.model, name, value)
        return True

    def of(self, name):
        return [row[f"train/{name}"] for row in self.logged]


def learn_and_set(step=65, n_steps=110, n_envs=1, model_kwargs=None, **values):
    callback = SetAt(step, **values)
    env = DummyVecEnv([RandomObsEnv] * n_envs)
    model = make_model(env, **(model_kwargs or {})).learn(n_steps, callback=callback, log_interval=None)
    return model, callback


def assert_consistent(model):
    """Also the remembered sums follow whatever was changed."""
    obs = model.replay.sample(64).next_observations
    assert relative_error(model.replay.logit_sums(obs), slow_logit_sums(model.policy, obs)) < 1e-4


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ent_coef", 0.7, [0.7] * 5),
        ("ent_coef", "lin_1", [40 / 110, 30 / 110, 20 / 110, 10 / 110, 0.01]),
        ("kl_coef", 3, [3.0] * 5),
        ("kl_coef", "rel_4", [0.4] * 5),
        ("kl_coef", lambda progress: 2 + progress, [2 + step / 110 for step in (40, 30, 20, 10, 0)]),
    ],
)
def test_coefficients_take_effect_at_the_next_update(name, value, expected):
    model, callback = learn_and_set(**{name: value})
    before = {"ent_coef": 0.1, "kl_coef": 1.0}[name]
    assert callback.of(name) == pytest.approx([before] * 4 + expected)
    kl_coef, ent_coef = callback.of("kl_coef")[-1], callback.of("ent_coef")[-1]
    weights = model.policy.frozen_critics.weights
    beta = kl_coef / (kl_coef + ent_coef)
    assert weights.scale == pytest.approx(1 / (kl_coef + ent_coef) / (1 - beta**4))
    assert weights.values[-2:] == pytest.approx([beta, 1.0])
    assert_consistent(model)


def test_automatic_coefficient_and_its_target_take_effect():
    """Each automatic value is within a factor of 1.3 of the one before; it rises as far as a high target asks."""
    _, callback = learn_and_set(ent_coef="auto_0.5")
    values = callback.of("ent_coef")
    assert values[:4] == [0.1] * 4 and values[4] != 0.1
    assert all(a / 1.301 <= b <= a * 1.301 for a, b in itertools.pairwise(values))

    auto = dict(ent_coef="auto_0.5", target_entropy=0.3, reward_scale=10.0)
    _, unchanged = learn_and_set(step=10**6, model_kwargs=auto)
    _, callback = learn_and_set(model_kwargs=auto, target_entropy=0.99)
    assert callback.of("ent_coef")[:4] == unchanged.of("ent_coef")[:4]
    assert callback.of("ent_coef")[-1] > 1.5 * unchanged.of("ent_coef")[-1]


@pytest.mark.parametrize("ent_coef", ["lin_0.05", "auto"])
def test_automatic_memory_is_bounded(ent_coef):
    """By the largest of the paper, where the entropy's weight falls to nothing: on a task without reward, too."""

    class NoReward(RandomObsEnv):
        def step(self, action):
            obs, _, *rest = super().step(action)
            return obs, 0.0, *rest

    model = make_model(
        NoReward(), ent_coef=ent_coef, memory_size="auto", policy_update_interval=1, train_freq=1, learning_starts=4,
        batch_size=2, net_arch=[2], average_size=2,
    )  # fmt: skip
    model.learn(400)
    assert model.n_policy_updates > 350 and len(model.policy.frozen_critics.weights) == 300


@pytest.mark.parametrize("logit_cache", [True, False])
@pytest.mark.parametrize("rule", ["weight_corrected", "truncated"])
def test_memory_size_takes_effect(rule, logit_cache):
    """Smaller: the next update deletes the surplus. Larger: the stack grows. What is computed stays consistent."""
    kwargs = dict(logit_rule=rule, logit_cache=logit_cache, average_window=0.01)
    model, callback = learn_and_set(model_kwargs=kwargs, memory_size=2)
    assert callback.of("n_frozen_critics") == [1, 2, 3, 4, 2, 2, 2, 2, 2]
    assert_consistent(model)
    model.memory_size = 5
    model.learn(60, reset_num_timesteps=False)
    assert len(model.policy.frozen_critics.weights) == model.policy.memory_size == 5
    assert_consistent(model)
    model.memory_size = "auto"
    model.learn(60, reset_num_timesteps=False)
    assert len(model.policy.frozen_critics.weights) == 11
    assert_consistent(model)


def test_interval_and_exploration_take_effect():
    model, callback = learn_and_set(policy_update_interval=15, exploration_initial_eps=1.0, exploration_final_eps=1.0)
    assert len(callback.logged) == 4 + 3  # at 30 to 60, 75, 90, 105
    assert model.exploration_rate == 1.0
    actions = np.bincount(model.replay_buffer.actions[66:110].ravel(), minlength=3)
    assert actions.min() >= 5  # of 44; uniform


def test_exploration_schedule_that_is_changed():
    """From the next step on the rate is that of the schedule that the new numbers make."""
    model, _ = learn_and_set(n_steps=100, exploration_final_eps=0.9, exploration_fraction=1.0)
    assert model.exploration_rate == pytest.approx(0.9)
    model, _ = learn_and_set(step=50, n_steps=75, exploration_initial_eps=0.2, exploration_fraction=1.0)
    assert model.exploration_rate == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("name", "value", "kwargs"),
    [
        ("ent_coef", -1.0, {}),
        ("ent_coef", "fast", {}),
        ("kl_coef", float("nan"), {}),
        ("kl_coef", "rel_x", {}),
        ("target_entropy", 1.5, dict(ent_coef="auto")),
        ("memory_size", 0, {}),
        ("memory_size", 2.5, {}),
        ("exploration_initial_eps", 1.5, {}),
        ("exploration_final_eps", -0.1, {}),
        ("exploration_fraction", 0, {}),
        ("batch_size", 0, {}),
        ("tau", 7.0, {}),
        ("gamma", 3.0, {}),
        ("policy_update_interval", 0, {}),
        ("target_update_interval", 0, {}),
        ("average_share", 9, {}),
        ("reward_scale", -1, {}),
    ],
)
def test_invalid_changes_are_refused_by_name(name, value, kwargs):
    """... before anything is pushed; the model can be mended and goes on."""
    model = make_model(RandomObsEnv(), **kwargs).learn(65)
    good = getattr(model, name)
    setattr(model, name, value)
    with pytest.raises(ValueError, match=f"Invalid {name}="):
        model.learn(20, reset_num_timesteps=False)
    assert len(model.policy.frozen_critics.weights) == model.n_policy_updates == 4
    setattr(model, name, good)
    model.learn(20, reset_num_timesteps=False)
    assert model.n_policy_updates >= 5
    assert_consistent(model)


@pytest.mark.parametrize(("new", "times"), [(5, [20, 25, 30, 35, 40]), (15, [20, 35])])
def test_interval_changed_by_a_hook(new, times):
    """It holds from the next update on."""

    class Change(UpdateSteps):
        def _on_training_start(self):
            super()._on_training_start()
            self.model.policy_update_hooks.append(lambda info: setattr(self.model, "policy_update_interval", new))

    model, callback = make_model(RandomObsEnv(), policy_update_interval=20, learning_starts=0, train_freq=1), Change()
    model.learn(42, callback=callback)
    assert [step for step, _ in callback.updates] == times


class StopAt(BaseCallback):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def _on_step(self):
        return self.num_timesteps < self.step


@pytest.mark.parametrize("stop_at", [101, 102, 103, 104])
def test_offline_after_a_rollout_that_was_stopped(stop_at):
    """Gradient steps count, whatever is left of the rollout; and the next ``learn`` is as ever."""
    model = make_model(RandomObsEnv(), train_freq=4, policy_update_interval=50)
    model.learn(1000, callback=StopAt(stop_at))
    before = model.n_policy_updates
    model.train(1000, 16)
    assert model.n_policy_updates - before in (20, 21)
    before = model.n_policy_updates
    model.learn(200, reset_num_timesteps=False)
    assert model.n_policy_updates - before in (3, 4, 5)


class CopyAt(BaseCallback):
    """Keep a copy of the model."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def _on_step(self):
        if self.num_timesteps == self.step:
            self.copy = copy.deepcopy(self.model)
        return True


def test_offline_with_a_copy_made_while_learning():
    """Of the copy, ``learn`` is not running: its gradient steps count."""
    model, copies = make_model(RandomObsEnv(), policy_update_interval=50), CopyAt(151)
    model.learn(200, callback=copies)
    copied, after_learn = copies.copy, copy.deepcopy(model)
    for trained in (copied, after_learn):
        before = trained.n_policy_updates
        trained.train(500, 16)
        assert trained.n_policy_updates - before in (10, 11)


def test_offline_with_a_checkpoint(tmp_path):
    """Of the loaded model, ``learn`` is not running either."""
    model = make_model(RandomObsEnv(), policy_update_interval=50)
    model.learn(200, callback=CheckpointCallback(151, tmp_path))
    loaded = StaQ.load(tmp_path / "rl_model_151_steps", env=RandomObsEnv())
    loaded.replay_buffer = model.replay_buffer
    before = loaded.n_policy_updates
    loaded.train(500, 16)
    assert loaded.n_policy_updates - before in (10, 11)


def test_schedules_see_no_negative_progress():
    """A rollout that ends after ``total_timesteps`` is at the end of the training, not behind it."""
    seen = []

    def schedule(progress):
        seen.append(progress)
        return 0.01 * progress

    make_model(RandomObsEnv(), learning_rate=schedule, train_freq=30, learning_starts=10).learn(50)
    assert min(seen) == 0
