"""Batches of the replay buffer: log pi(.|s') against ordinary networks in double precision, cached and direct."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomObsEnv, make_model, randomise, relative_error, slow_log_policy, slow_logit_sums
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_staq import StaQ, q_stack
from sb3_staq.replay import LogitCache, cache_fits, fingerprints

LOW_MEMORY = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))
BUFFERS = {
    "plain": dict(),
    "n_step": dict(n_steps=3),
    "dict": dict(policy="MultiInputPolicy"),
    "discrete": dict(),
    "low_memory": LOW_MEMORY,
    "rewards_normalised": dict(),
    "observations_normalised": dict(),
    "multi_discrete_actions": dict(),
    "box_actions": dict(action_bins=5),
}
ACTION_SPACES = {
    "multi_discrete_actions": spaces.MultiDiscrete([3, 2]),
    "box_actions": spaces.Box(-2, 3, (2,), np.float32),
}


def make(buffer="plain", n_envs=1, logit_cache=True, **kwargs):
    kind = buffer if buffer in ("dict", "discrete") else "box"
    space = ACTION_SPACES.get(buffer)
    env = DummyVecEnv([lambda: RandomObsEnv(kind, action_space=space) for _ in range(n_envs)])
    if buffer.endswith("normalised"):
        env = VecNormalize(env, norm_obs=buffer.startswith("observations"))
    return make_model(env, **{"logit_cache": logit_cache, **BUFFERS[buffer], **kwargs})


def sampled_error(model, n_batches=5):
    """The largest deviation of what gradient steps get from ordinary networks one by one."""
    errors = []
    for batch in model.replay.batches(n_batches, 64):
        logits = model.policy.frozen_critics.weights.scale * slow_logit_sums(model.policy, batch.next_observations)
        errors.append(relative_error(batch.next_log_prob, slow_log_policy(model.policy, logits)))
    return max(errors)


class Rows(BaseCallback):
    """Counts the observations that the stack is evaluated at."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.n_rows, self.largest = policy, 0, 0
        self.forward = policy.frozen_critics.forward
        policy.frozen_critics.forward = self.count

    def count(self, obs, average=False):
        n = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        self.n_rows += n
        self.largest = max(self.largest, n)
        return self.forward(obs, average)

    def _on_step(self):
        return True


@pytest.mark.parametrize("logit_cache", [True, False])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("buffer", BUFFERS)
def test_log_prob_of_batches(buffer, n_envs, logit_cache):
    """Right at any moment of a training: while the buffer fills, when it is full, after many policy updates."""
    model = make(buffer, n_envs, logit_cache, policy_update_interval=9)
    for _ in range(5):
        model.learn(90, reset_num_timesteps=False)
        assert sampled_error(model) < 1e-4
    assert model.replay_buffer.full
    assert model.n_policy_updates > 40


@pytest.mark.parametrize("buffer", ["plain", "n_step", "dict"])
def test_same_training_either_way(buffer):
    """The random numbers are used alike, so the trainings differ by rounding only."""
    params = []
    for logit_cache in (True, False):
        model = make(buffer, n_envs=2, logit_cache=logit_cache, learning_rate=1e-3).learn(60)
        params.append(np.concatenate([x.detach().numpy().ravel() for x in model.policy.critics.parameters()]))
    np.testing.assert_allclose(*params, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("change", ["sign", "one component", "whole rows"])
def test_edited_rows(change):
    """Rows that are written over in place are evaluated as they stand now, the others are not evaluated again."""
    model = make("plain", buffer_size=300, memory_size=6).learn(300)
    model.replay.sample(1024)
    array = model.replay_buffer.next_observations
    rng = np.random.default_rng(0)
    if change == "sign":
        array[50:150] *= -1
    elif change == "one component":
        array[50:150, 0, 2] = np.nextafter(array[50:150, 0, 2], 2)
    else:
        array[50:150] = rng.uniform(-1, 1, array[50:150].shape)
    rows = Rows(model.policy)
    assert sampled_error(model, n_batches=40) < 1e-4
    # The 100 edited rows, once; and once at most what they displaced, since the buffer is full
    assert 60 < rows.n_rows <= 700
    rows.n_rows = 0
    assert sampled_error(model, n_batches=40) < 1e-4
    assert rows.n_rows <= 350


def test_foreign_add_evaluates_new_rows_only():
    """Also many, of other environments' making, between two steps."""
    model = make("plain", buffer_size=3000, learning_starts=0, policy_update_interval=50).learn(100)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        obs, next_obs = rng.uniform(-1, 1, (2, 1, 4)).astype(np.float32)
        model.replay_buffer.add(obs, next_obs, np.zeros((1, 1)), np.ones(1), np.zeros(1), [{}])
    list(model.replay.batches(100, 256))  # nearly all of them have been sampled now
    rows = Rows(model.policy)
    for _ in range(20):
        obs, next_obs = rng.uniform(-1, 1, (2, 1, 4)).astype(np.float32)
        model.replay_buffer.add(obs, next_obs, np.zeros((1, 1)), np.ones(1), np.zeros(1), [{}])
        list(model.replay.batches(4, 64))
    assert rows.n_rows <= 30
    assert sampled_error(model) < 1e-4


def test_each_state_is_evaluated_once():
    """By the step that reaches it, which is also what the next action is drawn from; resets are evaluated, too."""
    model = make("plain", learning_starts=0, policy_update_interval=10**6, buffer_size=1000)
    randomise(model.policy.critics, 0)
    model.policy.push_critics(1.0, 0.1)
    rows = Rows(model.policy)
    model.learn(300)
    n_episodes = int(model.replay_buffer.dones[:300].sum()) + 1
    assert rows.n_rows <= 300 + n_episodes


@pytest.mark.parametrize("n_envs", [1, 2])
def test_hindsight_experience_replay(n_envs):
    """Relabelled next states are other states: right with the cache, and not worth it by "auto"."""
    kwargs = dict(replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(n_sampled_goal=4))
    for logit_cache in (True, "auto"):
        env = DummyVecEnv([lambda: BitFlippingEnv(n_bits=5)] * n_envs)
        model = make_model(env, "MultiInputPolicy", logit_cache=logit_cache, **kwargs).learn(100)
        assert (model.replay.cache is None) == (logit_cache == "auto")
        assert sampled_error(model) < 1e-4


def test_follows_a_thousand_updates():
    """The drift of the recursion stays at float rounding."""
    model = make("plain", memory_size=5).learn(200)
    model.replay.sample(1024)
    for i in range(1000):
        randomise(model.policy.critics, i)
        kl_coef, ent_coef = 1.0 + i % 7, 0.1 + 0.1 * (i % 3)
        model.replay.follow(*model.policy.push_critics(kl_coef, ent_coef))
        if i % 199 == 0:
            rows = Rows(model.policy)
            assert sampled_error(model, n_batches=20) < 1e-4
            model.policy.frozen_critics.forward = rows.forward
            assert rows.n_rows < 20


def test_many_deleted_at_once():
    """A stack that is made smaller during the training: the sums follow."""
    model = make("plain", memory_size=12).learn(200)
    assert len(model.policy.frozen_critics.weights) == 12
    model.memory_size = 3
    model.learn(20, reset_num_timesteps=False)
    assert len(model.policy.frozen_critics.weights) == 3
    assert sampled_error(model) < 1e-4


@pytest.mark.parametrize("at", [0, 1, 2])
def test_interrupted_follow(at, monkeypatch):
    """All is forgotten, so that nothing is half up to date."""
    model = make("plain").learn(200)
    monkeypatch.setattr("sb3_staq.replay.FOLLOW_ROWS", 64)
    q_values, count = model.policy.q_values, iter(range(10**6))

    def interrupted(*args):
        if next(count) == at:
            raise KeyboardInterrupt
        return q_values(*args)

    monkeypatch.setattr(model.policy, "q_values", interrupted)
    update, deleted = model.policy.push_critics(1.0, 0.1)
    with pytest.raises(KeyboardInterrupt):
        model.replay.follow(update, deleted)
    assert sampled_error(model) < 1e-4


def test_other_stacks_and_buffers():
    """After set_parameters, load_replay_buffer or a replaced buffer nothing is remembered that is not right."""
    model, other = make("plain").learn(150), make("plain", seed=1).learn(150)
    model.set_parameters(other.get_parameters())
    assert sampled_error(model) < 1e-4
    file = io.BytesIO()
    other.save_replay_buffer(file)
    file.seek(0)
    model.load_replay_buffer(file)
    assert sampled_error(model) < 1e-4
    model.replay_buffer = make("plain", seed=2).learn(150).replay_buffer
    assert sampled_error(model) < 1e-4
    model.policy.load_from_vector(model.policy.parameters_to_vector() * 1.1)
    assert sampled_error(model) < 1e-4


def test_capacity():
    """The oldest states are forgotten; duplicates take one place."""
    policy = make("plain").learn(60).policy
    cache = LogitCache(policy, 10)
    obs = th.rand(25, 4)
    for part in (obs[:7], obs[:7], obs[7:9], obs[8:18], obs):
        sums = cache.logit_sums(part)
        assert relative_error(sums, slow_logit_sums(policy, part)) < 1e-5
        assert len(cache) <= 10
    rows = Rows(policy)
    cache.logit_sums(obs[18:])
    assert rows.n_rows == 0
    cache.logit_sums(th.cat([obs[:3], obs[:3]]), remember=False)
    cache.logit_sums(obs[:3])
    assert rows.n_rows == 9
    cache.logit_sums(obs[:3])
    assert rows.n_rows == 9


# When it is used


@pytest.mark.parametrize(
    ("kwargs", "used"),
    [
        (dict(memory_size=50, buffer_size=1000, policy_update_interval=100), True),
        (dict(memory_size=2, buffer_size=1000, policy_update_interval=10), False),
        (dict(memory_size=2, buffer_size=1000, policy_update_interval=10, logit_rule="exact"), True),
        (dict(memory_size=3, logit_rule=[3.0, 2.0, 1.0]), False),
        (dict(memory_size=50, train_freq=(1, "episode"), gradient_steps=1), True),
    ],
)
def test_auto(kwargs, used):
    """Where two critics at all stored states cost less than the stack at the sampled ones, and the rule allows it."""
    model = make("plain", logit_cache="auto", **kwargs)
    assert (model.replay.cache is not None) == used


@pytest.mark.parametrize(("buffer", "used"), [("rewards_normalised", True), ("observations_normalised", False)])
def test_auto_with_normalisation(buffer, used):
    model = make(buffer, logit_cache="auto", memory_size=50, policy_update_interval=100)
    assert (model.replay.cache is not None) == used


@pytest.mark.parametrize(
    ("shape", "dtype", "n_bins", "fits"),
    [((4,), np.float32, 2, True), ((8,), np.float32, 4672, False), ((4, 84, 84), np.uint8, 6, True)],
)
def test_memory(shape, dtype, n_bins, fits):
    """At most 256 MB and half of the buffer: 1.9 GB of logits beside 6 MB of observations are too much."""
    space = spaces.Box(0, 255, shape, dtype)
    buffer = ReplayBuffer(100_000, space, spaces.Discrete(n_bins), optimize_memory_usage=False)
    assert cache_fits(buffer, n_bins) == fits


def test_images_are_evaluated_in_parts(monkeypatch):
    """Neither sampling nor an update evaluates more of them at a time than the bound says."""
    monkeypatch.setattr(q_stack, "OBS_ELEMENTS", 36 * 36 * 10)
    kwargs = dict(policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=8)), memory_size=6)
    for logit_cache in (True, False):
        model = make_model(RandomObsEnv("image"), "CnnPolicy", logit_cache=logit_cache, **kwargs)
        rows = Rows(model.policy)
        model.learn(60)
        assert model.n_policy_updates == 4
        assert rows.largest == 10
        assert sampled_error(model, n_batches=1) < 1e-4


# Fingerprints


def test_fingerprints_tell_states_apart():
    """All rows that differ, in structured ways as well: signs, order, single bits, images, keys."""
    rng = np.random.default_rng(0)
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 12), dtype=np.float32).reshape(12, -1).T
    grid = np.array(np.meshgrid(*[range(12)] * 4), dtype=np.float32).reshape(4, -1).T
    bits = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16)
    near = np.repeat(rng.normal(size=(1, 17)).astype(np.float32), 32 * 17, axis=0)
    near.view(np.uint32)[np.arange(32 * 17), np.arange(32 * 17) // 32] ^= np.uint32(1) << (
        np.arange(32 * 17, dtype=np.uint32) % 32
    )
    for rows in (signs, grid, bits, near, rng.normal(size=(100_000, 3)), np.arange(7).reshape(-1, 1)):
        keys = fingerprints(th.as_tensor(rows))
        assert len(set(keys)) == len(rows)
    a, b = th.rand(50, 3), th.rand(50, 3)
    assert not set(fingerprints({"a": a, "b": b})) & set(fingerprints({"a": b, "b": a}))
    assert fingerprints(a) == fingerprints(a.clone()) == [*fingerprints(a[:7]), *fingerprints(a[7:])]


def test_fingerprints_are_the_same_in_another_process():
    code = (
        "import torch as th; from sb3_staq.replay import fingerprints; print(fingerprints(th.arange(12.).view(3, 4)))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.strip() == str(fingerprints(th.arange(12.0).view(3, 4)))


# Saving


@pytest.mark.parametrize("buffer", ["plain", "dict"])
def test_state_of_the_cache(buffer):
    """What is remembered comes back bitwise, for the stack that it belongs to only."""
    model = make(buffer).learn(200)
    state = model.replay.cache.state_dict()
    other = make(buffer, seed=1)
    other.replay_buffer = model.replay_buffer
    other.policy.load_state_dict(model.policy.state_dict())
    other.replay.cache.load_state_dict(state)
    obs = model.replay.sample(64).next_observations
    rows = Rows(other.policy)
    assert th.equal(other.replay.logit_sums(obs), model.replay.logit_sums(obs))
    assert rows.n_rows == 0
    stranger = make(buffer, seed=2).learn(50)
    stranger.replay.cache.load_state_dict(state)
    assert len(stranger.replay.cache) == 0
    assert sampled_error(stranger) < 1e-4


def test_a_compiled_policy_trains_on():
    model = make("plain").learn(100)
    model.policy = th.compile(model.policy, backend="eager")
    n_updates = model.n_policy_updates
    model.learn(50, reset_num_timesteps=False)
    assert model.n_policy_updates == n_updates + 5
    assert sampled_error(model) < 1e-4


def test_non_finite_batches_are_refused():
    """A loaded buffer with NaN: the error names the field, and no parameter changes."""
    for name in ("rewards", "observations", "next_observations"):
        model = make("plain").learn(100)
        before = model.policy.parameters_to_vector()
        getattr(model.replay_buffer, name)[:] = np.nan
        with pytest.raises(ValueError, match=f"Invalid {name} in a batch of the replay buffer"):
            model.train(4, 16)
        np.testing.assert_array_equal(model.policy.parameters_to_vector(), before)


def test_a_subclass_of_staq_with_its_own_buffer():
    """Whatever a buffer hands out is what is evaluated."""

    class Shifted(ReplayBuffer):
        def _get_samples(self, batch_inds, env=None):
            samples = super()._get_samples(batch_inds, env)
            return samples._replace(next_observations=samples.next_observations + 0.5)

    for logit_cache in (True, "auto"):
        model = make("plain", replay_buffer_class=Shifted, logit_cache=logit_cache).learn(100)
        assert isinstance(model, StaQ)
        assert sampled_error(model) < 1e-4
