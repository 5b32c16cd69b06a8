"""Batches, and the remembered sums in them, against the whole stack in double precision, network by network."""

import copy
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    OneStateEnv,
    RandomObsEnv,
    grow,
    make_model,
    randomise,
    relative_error,
    sample_obs,
    slow_log_policy,
    slow_logit_sums,
)
from stable_baselines3 import DQN, HerReplayBuffer
from stable_baselines3.common.buffers import BaseBuffer, DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage

from sb3_staq import StaQ, replay
from sb3_staq import logit_cache as cache_file
from sb3_staq.logit_cache import LogitCache, cache_fits, fingerprints
from sb3_staq.replay import is_plain

NO_TIMEOUTS = dict(replay_buffer_kwargs=dict(handle_timeout_termination=False))
LOW_MEMORY = dict(optimize_memory_usage=True, **NO_TIMEOUTS)
BUFFERS = {
    "plain": dict(),
    "n_step": dict(n_steps=3),
    "dict": dict(policy="MultiInputPolicy"),
    "discrete": dict(),
    "low_memory": LOW_MEMORY,
    "multi_discrete_actions": dict(),
    "box_actions": dict(action_bins=5),
    "box_joint": dict(action_bins=5, critic="joint"),
}
ACTION_SPACES = {
    "multi_discrete_actions": spaces.MultiDiscrete([3, 2]),
    "box_actions": spaces.Box(-2, 3, (2,), np.float32),
    "box_joint": spaces.Box(-2, 3, (2,), np.float32),
}


def vec_env(kind="box", n_envs=1, **kwargs):
    return DummyVecEnv([lambda: RandomObsEnv(kind, **kwargs) for _ in range(n_envs)])


def make_cached(buffer="plain", n_envs=1, **kwargs):
    kind = buffer if buffer in ("dict", "discrete") else "box"
    env = vec_env(kind, n_envs, action_space=ACTION_SPACES.get(buffer))
    return make_model(env, **{"logit_cache": True, **BUFFERS[buffer], **kwargs})


def largest_error(model, n_batches=3, batch_size=64):
    """
    Of what batches say of the policy at their next states, and of the sums that it comes from, relative to the largest.
    """
    weights, errors = model.policy.frozen_critics.weights, []
    for batch in model.replay.batches(n_batches, batch_size):
        sums = slow_logit_sums(model.policy, batch.next_observations)
        errors.append(relative_error(batch.next_log_prob, slow_log_policy(model.policy, weights.scale * sums)))
        remembered = model.replay.logit_sums(batch.next_observations, remember=False)
        errors.append(relative_error(remembered, sums))
    assert len(errors) == 2 * n_batches
    return max(errors)


class CountingExtractor(BaseFeaturesExtractor):
    """Notes how many states reach the networks at a time."""

    rows: list[int]

    def __init__(self, observation_space):
        super().__init__(observation_space, 4)

    def forward(self, obs):
        type(self).rows.append(len(obs))
        flat = obs.flatten(1)
        return flat[:, :: max(1, flat.shape[1] // 4)][:, :4]


@pytest.fixture
def rows():
    CountingExtractor.rows = []
    return CountingExtractor.rows


COUNTING = dict(policy_kwargs=dict(features_extractor_class=CountingExtractor))


# Batches


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("buffer", ["plain", "n_step", "dict"])
def test_batches_are_parts_of_few_samples(buffer, cached, monkeypatch):
    """As many batches as are asked for, whole transitions of the buffer, drawn at most 1,024 states at a time."""
    model = make_cached(buffer, n_envs=2, logit_cache=cached).learn(60)
    drawn = []
    sample = model.replay.sample
    monkeypatch.setattr(model.replay, "sample", lambda size: drawn.append(size) or sample(size))
    batches = list(model.replay.batches(9, 200))
    assert drawn == [1000, 800] and len(batches) == 9

    def rows(observations, rewards, actions):
        observations = list(observations.values()) if isinstance(observations, dict) else [observations]
        arrays = [np.asarray(array, dtype=np.float64) for array in (*observations, rewards, actions)]
        return [np.concatenate([array[i].ravel() for array in arrays]) for i in range(len(rewards))]

    stored = model.replay_buffer
    flat = {key: x[:30].reshape(60, -1) for key, x in stored.observations.items()} if buffer == "dict" else None
    flat = flat or stored.observations[:30].reshape(60, -1)
    rewards = stored.rewards[:30].reshape(60)
    known = {tuple(row) for row in rows(flat, rewards, stored.actions[:30].reshape(60, -1))}
    for batch in batches:
        assert batch.next_log_prob.shape == (200, model.policy.branches.n_bins)
        assert (batch.discounts is not None) == (buffer == "n_step")
        if buffer != "n_step":  # whose rewards are sums
            assert {tuple(row) for row in rows(batch.observations, batch.rewards, batch.actions)} <= known


@pytest.mark.parametrize("buffer", ["plain", "dict", "n_step", "box_joint"])
def test_parts_of_samples_stay_in_order(buffer):
    """Side by side, the parts are the whole again, field by field."""
    batch = make_cached(buffer, n_envs=2).learn(60).replay.sample(70)
    parts = list(batch.split(20))
    assert [len(part.rewards) for part in parts] == [20, 20, 20, 10]
    assert (batch.next_actions is not None) == (buffer == "box_joint")

    def assert_same(whole, split):
        if whole is None:
            assert split == [None] * 4
        elif isinstance(whole, th.Tensor):
            assert th.equal(th.cat(split), whole)
        else:
            keys = whole if isinstance(whole, dict) else range(len(whole))
            assert len(whole) > 0
            for key in keys:
                assert_same(whole[key], [part[key] for part in split])

    assert_same(batch, parts)


def test_samples_of_ones_own_buffer_stay_whole():
    """They may have any number of transitions, and fields of other kinds."""

    class Samples(NamedTuple):
        observations: th.Tensor
        actions: th.Tensor
        next_observations: th.Tensor
        dones: th.Tensor
        rewards: th.Tensor
        discounts: None = None
        temperature: float = 1.0

    class DoubledBuffer(ReplayBuffer):
        def sample(self, batch_size, env=None):
            return Samples(*super().sample(2 * batch_size, env)[:5])

    model = make_model(RandomObsEnv(), replay_buffer_class=DoubledBuffer).learn(60)
    assert model._n_updates == 40
    assert [len(batch.rewards) for batch in model.replay.batches(3, 16)] == [32] * 3


# The remembered sums are those of the stack


@pytest.mark.parametrize(("buffer", "n_envs"), [*((buffer, 3) for buffer in BUFFERS), ("plain", 1), ("low_memory", 1)])
def test_sums_equal_those_of_the_stack(buffer, n_envs):
    """
    After many policy updates, with the buffer wrapped several times, episodes ended both ways and coefficients that
    change.
    """
    model = make_cached(buffer, n_envs, buffer_size=100, kl_coef="lin_3_0.5", ent_coef="lin_0.5_0.05")
    model.learn(450)
    assert model.replay_buffer.full
    assert model.n_policy_updates >= 42
    assert len(model.policy.frozen_critics.weights) == 4
    assert 0 < len(model.replay.cache) <= 100
    assert model.replay_buffer.dones.any()
    if buffer != "low_memory":
        assert model.replay_buffer.timeouts.any()
        assert (model.replay_buffer.dones > model.replay_buffer.timeouts).any()
    assert largest_error(model) < 1e-4


@pytest.mark.parametrize("rule", ["weight_corrected", "truncated", "exact"])
@pytest.mark.parametrize("memory_size", [1, 2, 7])
def test_sums_for_all_memory_sizes_and_rules(memory_size, rule):
    model = make_cached(memory_size=memory_size, logit_rule=rule, policy_update_interval=3, buffer_size=60)
    model.learn(150)
    assert model.n_policy_updates == 43
    assert len(model.policy.frozen_critics.weights) == (43 if rule == "exact" else memory_size)
    assert largest_error(model) < 1e-4


def test_sums_with_large_steps_between_policies():
    """Critics that change beyond recognition between updates, and Q-values far from zero: the errors stay small."""
    model = make_cached(n_envs=3, learning_rate=0.1, reward_scale=100.0, ent_coef=5.0, memory_size=10, buffer_size=90)
    model.learn(300)
    sums = slow_logit_sums(model.policy, model.replay.sample(64).next_observations)
    assert sums.abs().max() > 100
    assert largest_error(model) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("memory_size", [1, 10, 300])
def test_sums_after_a_thousand_updates_of_a_training(memory_size):
    """Whatever the coefficients do; the buffer is overwritten 13 times."""
    model = make_cached(
        policy_update_interval=1, memory_size=memory_size, buffer_size=80, kl_coef="lin_20_2", ent_coef="lin_0.4_0.1"
    )
    model.learn(1040)
    assert model.n_policy_updates == 1020
    assert len(model.policy.frozen_critics.weights) == memory_size
    assert largest_error(model) < 1e-4


@pytest.mark.parametrize(("rule", "n_updates"), [("weight_corrected", 1000), ("truncated", 300), ("exact", 300)])
def test_rounding_does_not_add_up(rule, n_updates):
    """The same states follow all of them: as near to the stack in double precision as its direct evaluation."""
    model = make_model(RandomObsEnv(), net_arch=(4,), logit_rule=rule, memory_size=30, n_critics=1, average_window=0.01)
    policy, cache = model.policy, LogitCache(model.policy, 50)
    obs = sample_obs(model.observation_space, 50)
    cache.logit_sums(obs)
    for i in range(n_updates):
        randomise(policy.critics, i)
        update, deleted = policy.push_critics(2.0 - i / n_updates, 0.1 + i / n_updates)
        cache.follow(update, policy.frozen_critics.newest, deleted)
    assert len(cache) == 50
    expected = slow_logit_sums(policy, obs)
    direct = relative_error(policy.logit_sums(obs), expected)
    assert not th.equal(cache.logit_sums(obs), policy.logit_sums(obs))  # they were remembered
    assert relative_error(cache.logit_sums(obs), expected) < 4 * max(direct, 2.0**-24)


@pytest.mark.parametrize("kind", ["box", "dict", "image"])
def test_any_sequence_of_calls(kind):
    """Known states and new ones, several at once, more than fit, remembered or not; with policy updates between."""
    policy = {"dict": "MultiInputPolicy", "image": "CnnPolicy"}.get(kind, "MlpPolicy")
    model = make_model(RandomObsEnv(kind), policy, memory_size=3, **(COUNTING if kind == "image" else {}))
    CountingExtractor.rows = []
    policy, cache = model.policy, LogitCache(model.policy, 7)
    obs = sample_obs(model.observation_space, 20)
    if kind == "image":
        obs = obs.permute(0, 3, 1, 2).contiguous()
    generator = np.random.default_rng(0)
    for step in range(150):
        if step % 5 == 4:
            randomise(policy.critics, step)
            update, deleted = policy.push_critics(*generator.uniform(0.1, 1.0, 2))
            if step % 25 != 4:  # else the cache is not told
                cache.follow(update, policy.frozen_critics.newest, deleted)
        index = generator.integers(20, size=generator.integers(1, 15))
        batch = {key: x[index] for key, x in obs.items()} if kind == "dict" else obs[index]
        sums = cache.logit_sums(batch, remember=bool(generator.integers(4)))
        if step >= 4:
            assert relative_error(sums, slow_logit_sums(policy, batch)) < 1e-4
        assert len(cache) <= 7
    assert len(cache) == 7


def test_a_push_that_the_cache_was_not_told_of():
    """Right before one that it was told of: nothing that was remembered is of use."""
    model = make_model(RandomObsEnv())
    policy, cache = model.policy, LogitCache(model.policy, 50)
    grow(model, 3)
    obs = sample_obs(model.observation_space, 20)
    cache.logit_sums(obs)
    for seed in (10, 11):
        randomise(policy.critics, seed)
        update, deleted = policy.push_critics(1.0, 0.1)
    cache.follow(update, policy.frozen_critics.newest, deleted)
    assert relative_error(cache.logit_sums(obs), slow_logit_sums(policy, obs)) < 1e-5


@pytest.mark.parametrize("n_envs", [1, 3])
def test_acting_uses_the_current_policy(n_envs):
    """The sums that choose actions are those of the stack at the current observations."""

    class Compare(BaseCallback):
        worst, compared = 0.0, 0

        def _on_step(self):
            if self.model.n_policy_updates > 0:
                obs = th.as_tensor(self.model._last_obs)
                sums = self.model.replay.logit_sums(
                    self.model.policy.obs_to_tensor(self.model._last_obs)[0], remember=False
                )
                self.worst = max(self.worst, relative_error(sums, slow_logit_sums(self.model.policy, obs)))
                self.compared += 1
            return True

    for kwargs in (dict(), LOW_MEMORY):
        callback = Compare()
        make_model(vec_env(n_envs=n_envs), logit_cache=True, **kwargs).learn(100, callback=callback)
        assert callback.compared > 10
        assert callback.worst < 1e-4


# What is evaluated, and what is not


@pytest.mark.parametrize("buffer", ["plain", "n_step", "low_memory"])
def test_only_new_states_are_evaluated(buffer, rows):
    """Batches of known states cost nothing; of added and edited transitions, only what is new."""
    model = make_cached(buffer, n_envs=2, buffer_size=200, **COUNTING).learn(120)
    stored = model.replay_buffer
    array = stored.observations if model.optimize_memory_usage else stored.next_observations

    def n_evaluated():
        rows.clear()
        model.replay.logit_sums(th.as_tensor(array[: stored.pos]).flatten(0, 1))
        return sum(rows)

    n_evaluated()  # what was stored before learning started
    assert n_evaluated() == 0
    list(model.replay.batches(10, 100))
    assert rows == []

    for i in range(7):
        obs, next_obs = np.full((2, 2, 4), (0.1 + i) / 7, np.float32)
        obs[1] += 0.01
        next_obs[:] = -obs
        stored.add(obs, next_obs, stored.actions[0], stored.rewards[0], np.zeros(2), [{}] * 2)
    assert n_evaluated() == 14
    assert n_evaluated() == 0
    assert largest_error(model) < 1e-4

    array[5:15] *= -1
    assert n_evaluated() == 20
    assert n_evaluated() == 0
    assert largest_error(model) < 1e-4


def test_a_step_evaluates_new_states_once(rows):
    """With two environments, a step costs two new states, and one more at the beginning of an episode."""
    model = make_cached(n_envs=2, gradient_steps=0, **COUNTING)
    grow(model, 3)
    model.learn(40)
    rows.clear()
    n_before = sum(len(env.actions) for env in model.env.envs)
    model.learn(40, reset_num_timesteps=False)
    n_steps = sum(len(env.actions) for env in model.env.envs) - n_before
    n_episodes = int(model.replay_buffer.dones[:40].sum())
    assert n_steps == 40
    assert 40 <= sum(rows) <= 40 + n_episodes + 2


class OtherTypes(DummyVecEnv):
    """Returns observations of double precision, as ``SubprocVecEnv`` does if the environments do."""

    def _obs_from_buf(self):
        return super()._obs_from_buf().astype(np.float64)


def test_states_of_another_type_than_that_of_the_space_are_evaluated_once(rows):
    model = make_cached(n_envs=2, gradient_steps=0, **COUNTING)
    other = make_model(OtherTypes([RandomObsEnv] * 2), logit_cache=True, gradient_steps=0, **COUNTING)
    n_evaluated = []
    for each in (model, other):
        grow(each, 3)
        rows.clear()
        each.learn(80)
        n_evaluated.append(sum(rows))
    assert other._last_obs.dtype == np.float64
    assert n_evaluated[1] < 1.2 * n_evaluated[0]


@pytest.mark.parametrize("buffer", ["plain", "low_memory"])
def test_a_step_remembers_its_next_states(buffer, rows):
    model = make_cached(buffer, n_envs=2, buffer_size=200, gradient_steps=0, **COUNTING)
    grow(model, 3)
    model.learn(40)
    stored = model.replay_buffer
    low_memory = model.optimize_memory_usage
    latest = stored.observations[stored.pos] if low_memory else stored.next_observations[stored.pos - 1]
    assert len(rows) > 0
    rows.clear()
    model.replay.logit_sums(th.as_tensor(latest), remember=False)
    assert rows == []


def test_an_update_costs_two_critics(rows):
    """M does not cost M: with any memory the networks see each remembered state twice per policy update."""
    model = make_cached(memory_size=30, buffer_size=200, gradient_steps=0, average_window=0.01, **COUNTING).learn(200)
    for i in range(32):
        randomise(model.policy.critics, i)
        model.policy.push_critics(1.0, 0.1)
    obs = th.as_tensor(model.replay_buffer.next_observations[:, 0])
    cache = model.replay.cache
    cache.logit_sums(obs)
    randomise(model.policy.critics, 100)
    update, deleted = model.policy.push_critics(1.0, 0.1)
    rows.clear()
    model.replay.follow(update, deleted)
    assert rows == [200, 200]
    assert len(model.policy.frozen_critics.weights) == 30
    sums = cache.logit_sums(obs)
    assert rows == [200, 200]
    assert relative_error(sums, slow_logit_sums(model.policy, obs)) < 1e-5


class ImageEnv(RandomObsEnv):
    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Box(0, 255, (2, 128, 128), np.uint8)


@pytest.mark.parametrize("cached", [True, False])
def test_images_are_evaluated_in_bounded_batches(cached, rows):
    """At most 64 of 2^15 elements reach the networks at a time, except as many as the batch of a gradient step has."""
    model = make_model(ImageEnv(), "CnnPolicy", logit_cache=cached, gradient_steps=0, buffer_size=600, **COUNTING)
    model.learn(200)
    for _ in range(400):
        obs = np.random.default_rng(len(rows)).integers(256, size=(2, 1, 2, 128, 128), dtype=np.uint8)
        model.replay_buffer.add(*obs, np.zeros((1, 1)), np.ones(1), np.zeros(1), [{}])
    randomise(model.policy.critics, 0)
    model.policy.push_critics(1.0, 0.1)
    rows.clear()
    model.update_policy()
    list(model.replay.batches(20, 30))
    model.predict(np.zeros((300, 2, 128, 128), np.uint8))
    assert sum(rows) > 1000
    assert max(rows) == 2**21 // 2**15 == 64
    rows.clear()
    model.train(gradient_steps=4, batch_size=30)
    assert max(rows) == 64


@pytest.mark.parametrize("cached", [True, False])
def test_samples_of_large_observations_are_small(cached, monkeypatch):
    """Batches are drawn one by one where several would take much memory; more is measured than is drawn at a time."""
    model = make_model(ImageEnv(), "CnnPolicy", logit_cache=cached, buffer_size=20, **COUNTING)
    CountingExtractor.rows = []
    assert model.replay.states_at_once == 2**24 // 2**15 == 512
    monkeypatch.setattr(replay, "SAMPLE_ELEMENTS", 2**15 * 50)
    model._replay = None
    model.learn(30)
    drawn = []
    sample = model.replay.sample
    monkeypatch.setattr(model.replay, "sample", lambda size: drawn.append(size) or sample(size))
    list(model.replay.batches(7, 16))
    assert drawn == [48, 48, 16]


@pytest.mark.parametrize(
    ("batch_size", "n_steps", "n_envs", "n_states"),
    [(16, 40, 1, 40), (16, 40, 2, 40), (16, 1500, 1, 1024), (80, 40, 1, 80)],
)
def test_number_of_states_at_which_a_policy_update_is_measured(batch_size, n_steps, n_envs, n_states, monkeypatch):
    """As many as are stored, up to 1,024, but no fewer than a batch."""
    model = make_model(vec_env(n_envs=n_envs), batch_size=batch_size, gradient_steps=0, buffer_size=2000).learn(n_steps)
    drawn, sample = [], model.replay_buffer.sample
    monkeypatch.setattr(model.replay_buffer, "sample", lambda n, **kwargs: drawn.append(n) or sample(n, **kwargs))
    model.update_policy()
    assert drawn == [n_states]


def test_one_hot_observations_are_evaluated_in_bounded_batches(rows):
    """The size that counts is that after the preprocessing."""

    class ManyStates(RandomObsEnv):
        def __init__(self):
            super().__init__()
            self.observation_space = spaces.Discrete(2**15)

    model = make_model(ManyStates(), logit_cache=False, **COUNTING).learn(40)
    assert model.replay.states_at_once == 2**24 // 2**15
    model.update_policy()
    rows.clear()
    model.predict(np.zeros(300, int), deterministic=True)
    assert sum(rows) >= 300 and max(rows) == 2**21 // 2**15


# Where the cache is used


@pytest.mark.parametrize(
    ("kwargs", "cached"),
    [
        # Per policy update: 2 * buffer_size evaluations, or memory_size * batch_size * gradient steps
        (dict(buffer_size=1000, memory_size=10, batch_size=20, policy_update_interval=10), True),
        (dict(buffer_size=1001, memory_size=10, batch_size=20, policy_update_interval=10), False),
        (dict(buffer_size=1001, memory_size=11, batch_size=20, policy_update_interval=10), True),
        (dict(buffer_size=1000, memory_size=10, batch_size=20, policy_update_interval=10, gradient_steps=1), True),
        (dict(buffer_size=1000, memory_size=10, batch_size=20, policy_update_interval=10, train_freq=2), True),
        (
            dict(buffer_size=1000, memory_size=10, batch_size=20, policy_update_interval=10, train_freq=2)
            | dict(gradient_steps=1),
            False,
        ),
        (dict(buffer_size=1000, memory_size=10, batch_size=20, policy_update_interval=9), False),
        (dict(buffer_size=10**5, memory_size=1, train_freq=(1, "episode"), gradient_steps=5), True),
        (dict(buffer_size=10**5, memory_size=1, train_freq=(1, "episode"), gradient_steps=-1), False),
        (dict(buffer_size=10**5, memory_size=1, logit_rule="exact"), True),
    ],
)
def test_automatic_choice_takes_what_costs_less(kwargs, cached):
    assert (make_model(vec_env(), logit_cache="auto", **kwargs).replay.cache is not None) == cached


def test_automatic_choice_bounds_the_memory():
    """At most 256 MB and half of what the replay buffer's observations take; a state, 4 bytes per bin, and a key."""
    box, image = spaces.Box(-1, 1, (8,), np.float32), spaces.Box(0, 255, (1, 84, 84), np.uint8)
    action = spaces.Discrete(2)
    assert cache_fits(ReplayBuffer(100_000, box, action), 4)
    assert not cache_fits(ReplayBuffer(100_000, box, action), 4672)
    for n_bins, fits in [(633, True), (634, False)]:  # 2^28 bytes / 100,000 are 4 * 633.6 + 150
        assert cache_fits(ReplayBuffer(100_000, box, action), n_bins) == fits
    images = ReplayBuffer(100_000, image, action)  # 706 MB of observations, and as many of next ones
    assert cache_fits(images, 4)  # a copy of the next states is half of both
    assert not cache_fits(ReplayBuffer(100_000, image, action), 700)
    assert not cache_fits(
        ReplayBuffer(100_000, image, action, optimize_memory_usage=True, handle_timeout_termination=False), 4
    )
    assert cache_fits(ReplayBuffer(30_000, image, action), 4)  # 212 MB
    both = spaces.Dict(a=box, b=image)
    assert cache_fits(DictReplayBuffer(30_000, both, action), 4)
    assert not cache_fits(DictReplayBuffer(40_000, both, action), 2000)
    for n_envs, size in [(1, 100_000), (4, 100_000)]:  # the size is that of all environments
        assert not cache_fits(ReplayBuffer(size, box, action, n_envs=n_envs), 700)
        assert cache_fits(ReplayBuffer(size, box, action, n_envs=n_envs), 600)
    model = make_model(RandomObsEnv(n_actions=5000), buffer_size=20_000, memory_size=10**4, logit_cache="auto")
    assert model.replay.cache is None


def her_model(**kwargs):
    return make_model(BitFlippingEnv(n_bits=5), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer, **kwargs)


def test_automatic_choice_where_states_do_not_come_again():
    """HER relabels its transitions, VecNormalize's statistics move; normalised rewards change nothing."""
    for model, cached in [
        (her_model(logit_cache="auto"), False),
        (make_model(VecNormalize(vec_env(n_envs=2)), logit_cache="auto"), False),
        (make_model(VecNormalize(vec_env(n_envs=2), norm_obs=False), logit_cache="auto"), True),
        (make_model(vec_env(), logit_cache="auto"), True),
        (make_model(vec_env(), logit_cache=False), False),
    ]:
        model.learn(100)
        assert (model.replay.cache is not None) == cached
        assert model.n_policy_updates == 8
        assert largest_error(model) < 1e-4


def test_hindsight_experience_replay_with_remembered_sums():
    """Relabelled states have other goals, so other content; the few that there are here come again."""
    model = her_model(logit_cache=True).learn(200)
    assert 20 < len(model.replay.cache) <= 300
    assert largest_error(model, n_batches=10) < 1e-4


@pytest.mark.parametrize("kind", ["box", "dict", "image"])
@pytest.mark.parametrize("norm_obs", [False, True])
def test_vec_normalize_with_remembered_sums(kind, norm_obs, rows):
    """Rewards only: what was stored is known. Observations: states are those that the critics see, as they move."""
    env = vec_env(kind, n_envs=2)
    if kind == "image":
        env = VecTransposeImage(env)
    env = VecNormalize(env, norm_obs=norm_obs, norm_obs_keys=["a"] if kind == "dict" else None)
    kwargs = dict(policy_kwargs=dict(features_extractor_class=CountingExtractor, normalize_images=False))
    if kind == "dict":
        kwargs = {}
    model = make_model(env, "MultiInputPolicy" if kind == "dict" else "MlpPolicy", logit_cache=True, **kwargs)
    model.learn(100)
    assert largest_error(model) < 1e-4
    if not norm_obs and kind != "dict":
        list(model.replay.batches(10, 100))
        rows.clear()
        list(model.replay.batches(10, 100))
        assert rows == []
        model.learn(20, reset_num_timesteps=False)
        assert len(model.replay.cache) == 120  # each state once, whoever evaluated it first


def test_subclasses_of_buffers():
    """A subclass may hand out other next states than those that were added: "auto" does not remember, True is right."""

    class Shuffled(ReplayBuffer):
        def sample(self, batch_size, env=None):
            samples = super().sample(batch_size, env)
            return samples._replace(next_observations=samples.next_observations.flip(1))

    for logit_cache in ("auto", True):
        model = make_model(vec_env(), replay_buffer_class=Shuffled, logit_cache=logit_cache).learn(80)
        assert (model.replay.cache is None) == (logit_cache == "auto")
        assert largest_error(model) < 1e-4
    env_spaces = vec_env().observation_space, vec_env().action_space
    assert is_plain(ReplayBuffer(10, *env_spaces))
    assert is_plain(NStepReplayBuffer(10, *env_spaces))
    assert is_plain(DictReplayBuffer(10, vec_env("dict").observation_space, env_spaces[1]))
    assert not is_plain(Shuffled(10, *env_spaces))
    assert not is_plain(her_model().replay_buffer)


class WithoutReplacement(ReplayBuffer):
    def sample(self, batch_size, env=None):
        return self._get_samples(np.random.choice(self.size(), batch_size, replace=False), env)


class OwnBuffer(BaseBuffer):
    """Derived from SB3's base class of all buffers, as those with priorities often are."""

    def __init__(self, buffer_size, *args, optimize_memory_usage=False, **kwargs):
        super().__init__(buffer_size, *args, **kwargs)
        self.transitions = []

    def add(self, *transition):
        self.transitions += zip(*(np.array(x) for x in transition[:5]), strict=True)
        self.pos = len(self.transitions)

    def _get_samples(self, batch_inds, env=None):
        rows = [self.transitions[i] for i in batch_inds]
        obs, next_obs, actions, rewards, dones = map(th.as_tensor, map(np.stack, zip(*rows, strict=True)))
        actions = actions.reshape(len(rows), -1)  # Discrete ones are stored as vectors
        return ReplayBufferSamples(obs, actions, next_obs, dones.float()[:, None], rewards[:, None])


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("buffer_class", [WithoutReplacement, OwnBuffer])
def test_buffers_of_ones_own(buffer_class, n_envs):
    model = make_model(vec_env(n_envs=n_envs), replay_buffer_class=buffer_class, learning_starts=40)
    for _ in range(2):
        model.learn(100)
    model.learn(40, reset_num_timesteps=False)
    assert model.n_policy_updates == 16 and model._n_updates == 160
    assert largest_error(model, batch_size=30) < 1e-4


def test_normalization_that_comes_later():
    """``set_env`` with a VecNormalize: the critics see normalised observations from then on."""
    for logit_cache in ("auto", True):
        model = make_model(vec_env(), logit_cache=logit_cache)
        model.learn(60)
        assert model.replay.cache is not None
        env = VecNormalize(vec_env())
        env.obs_rms.mean += 10.0
        env.training = False
        model.set_env(env)
        model.learn(60)
        assert (model.replay.cache is None) == (logit_cache == "auto")
        assert model.replay.sample(64).next_observations.mean() < -5
        assert largest_error(model) < 1e-4


@pytest.mark.parametrize(
    ("buffer", "n_envs", "n_steps"),
    [
        ("plain", 1, 600),
        ("n_step", 3, 1200),
        ("dict", 3, 1200),
        ("low_memory", 3, 1200),
        ("box_joint", 3, 1200),
        pytest.param("plain", 4, 20_000, marks=pytest.mark.slow),
    ],
)
def test_same_training_with_and_without_cache(buffer, n_envs, n_steps):
    """From one seed the same actions, and the same entropies and automatic coefficients up to rounding."""
    actions, parameters, logged = {}, {}, {True: [], False: []}

    class Note(BaseCallback):
        def _on_training_start(self):
            self.model.policy_update_hooks.append(lambda info: logged[self.model.logit_cache].append(self.now()))

        def now(self):
            return [
                self.model.logger.name_to_value[f"train/{name}"] for name in ("entropy", "ent_coef", "kl_divergence")
            ]

        def _on_step(self):
            return True

    for logit_cache in (True, False):
        env = vec_env(buffer if buffer == "dict" else "box", n_envs, action_space=ACTION_SPACES.get(buffer))
        kwargs = dict(learning_rate=1e-3, gradient_steps=1, train_freq=4, policy_update_interval=100, buffer_size=600)
        model = make_model(env, logit_cache=logit_cache, ent_coef="auto", **{**BUFFERS[buffer], **kwargs})
        model.learn(n_steps, callback=Note())
        actions[logit_cache] = [single.actions for single in env.envs]
        parameters[logit_cache] = th.cat([param.flatten() for param in model.policy.critics.parameters()])
        assert (model.replay.cache is not None) == logit_cache
        assert model.n_policy_updates == (n_steps - 20) // 100
    one, other = (np.array(actions[logit_cache]) for logit_cache in (True, False))
    assert len(one) * len(one[0]) == len(other) * len(other[0]) == n_steps
    # In thousands of steps one random number may lie so close to a threshold that rounding decides: up to there, all is
    # the same
    different = np.flatnonzero((one != other).reshape(n_envs, n_steps // n_envs, -1).any(axis=(0, 2)))
    n_same = n_envs * (different[0] if len(different) else n_steps // n_envs)
    assert n_same >= min(n_steps, 4000)
    n_updates = (n_same - 20) // 100
    np.testing.assert_allclose(logged[True][:n_updates], logged[False][:n_updates], rtol=1e-3, atol=1e-4)
    if n_same == n_steps:
        assert relative_error(parameters[True], parameters[False]) < 1e-3


# Transitions and parameters that did not come through the training loop


def add_by_hand(model, n):
    """Fill a replay buffer from outside, as with demonstrations; actions and rewards as in the transition before."""
    buffer = model.replay_buffer
    space = model.observation_space
    for _ in range(n):
        obs, next_obs = (np.stack([space.sample() for _ in range(buffer.n_envs)]) for _ in range(2))
        action, reward = buffer.actions[buffer.pos - 1].copy(), buffer.rewards[buffer.pos - 1].copy()
        buffer.add(obs, next_obs, action, reward, np.zeros(buffer.n_envs), [{}] * buffer.n_envs)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("n_added", [1, 30, 60])
def test_transitions_added_by_hand(n_added, n_envs):
    """Also when the buffer (30 rows) has been filled exactly; and ever after."""
    model = make_model(vec_env(n_envs=n_envs), buffer_size=30 * n_envs, logit_cache=True)
    model.learn(90 * n_envs)
    assert (model.replay_buffer.pos, model.replay_buffer.full) == (0, True)
    add_by_hand(model, n_added)
    assert largest_error(model) < 1e-4
    model.learn(38, reset_num_timesteps=False)
    assert largest_error(model) < 1e-4


def test_transitions_added_by_hand_before_learning():
    model = make_model(vec_env(), buffer_size=30, learning_starts=0, logit_cache=True)
    add_by_hand(model, 30)
    model.learn(25)
    assert model.n_policy_updates == 2
    assert largest_error(model) < 1e-4


@pytest.mark.parametrize("buffer", ["plain", "low_memory", "dict"])
def test_transitions_edited_in_place(buffer):
    """Also while learning goes on, of any field of an observation."""

    class Edit(BaseCallback):
        def _on_step(self):
            if self.n_calls % 25 == 24:
                stored = self.model.replay_buffer
                arrays = [stored.observations] if stored.optimize_memory_usage else [stored.next_observations]
                for array in arrays:
                    (array["a"] if isinstance(array, dict) else array)[3:40, :, 1] *= -1
                if buffer == "dict":
                    stored.next_observations["b"][5:10] = 4 - stored.next_observations["b"][5:10]
                assert largest_error(self.model, n_batches=1) < 1e-4 or self.model.n_policy_updates == 0
            return True

    model = make_cached(buffer, n_envs=2, buffer_size=100)
    model.learn(60)
    model.learn(160, callback=Edit(), reset_num_timesteps=False)
    assert largest_error(model) < 1e-4


def test_loaded_replay_buffers(tmp_path):
    """For ``train`` at once and for ``learn``; a full buffer of another model likewise."""
    model = make_model(vec_env(), buffer_size=30, logit_cache=True)
    model.learn(97)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")

    loaded = StaQ.load(tmp_path / "model", env=vec_env())
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.set_logger(model.logger)
    loaded.train(gradient_steps=1, batch_size=16)
    assert largest_error(loaded) < 1e-4
    loaded.learn(25, reset_num_timesteps=False)
    assert largest_error(loaded) < 1e-4

    other = make_model(vec_env(), buffer_size=30, seed=1, logit_cache=True)
    other.learn(90)
    other.load_replay_buffer(tmp_path / "buffer")
    other.train(gradient_steps=1, batch_size=16)
    assert other.replay.cache is not None
    assert largest_error(other) < 1e-4


def test_a_loaded_buffer_changes_neither_the_choice_nor_its_attributes(tmp_path):
    """Also where another choice would be cheaper, and nothing of the file stays on the buffer."""
    large = make_model(RandomObsEnv(), buffer_size=5000, logit_cache=True).learn(40)
    names = set(vars(large.replay_buffer))
    large.save_replay_buffer(tmp_path / "buffer")
    assert set(vars(large.replay_buffer)) == names
    model = make_model(RandomObsEnv(), buffer_size=300, logit_cache="auto").learn(40)
    assert model.replay.cache is not None
    model.load_replay_buffer(tmp_path / "buffer")
    assert model.replay.cache is not None
    assert set(vars(model.replay_buffer)) == names


OTHER_PARAMETERS = {
    "set_parameters": lambda model, other: model.set_parameters(other.get_parameters()),
    "load_state_dict": lambda model, other: model.policy.load_state_dict(other.policy.state_dict()),
    "load_from_vector": lambda model, other: model.policy.load_from_vector(other.policy.parameters_to_vector()),
    "push_critics": lambda model, other: model.policy.push_critics(1.0, 0.1),
    "another policy": lambda model, other: setattr(model, "policy", other.policy),
}


@pytest.mark.parametrize("way", OTHER_PARAMETERS)
def test_other_parameters(way):
    """Whatever the policy was given, the sums are those of the stack that it has now."""
    model = make_model(vec_env(), buffer_size=30, logit_cache=True).learn(90)
    other = make_model(vec_env(), buffer_size=30, seed=1).learn(90)
    obs = model.replay.sample(30).next_observations
    before = model.replay.logit_sums(obs)
    OTHER_PARAMETERS[way](model, other)
    assert relative_error(model.replay.logit_sums(obs), before.double()) > 1e-2
    assert largest_error(model) < 1e-4
    model.learn(30, reset_num_timesteps=False)
    assert largest_error(model) < 1e-4


@pytest.mark.parametrize("hook", ["_on_rollout_start", "_on_rollout_end"])
def test_actions_follow_parameters_loaded_between_rollouts(hook):
    """So greedy that the actions are known: they are those of the stack that was loaded just before."""
    greedy = dict(kl_coef=1e-7, ent_coef=1e-7, exploration_initial_eps=0.0, exploration_final_eps=0.0)
    model = make_model(vec_env(), buffer_size=300, logit_cache=True, **greedy).learn(60)
    parameters = [make_model(vec_env(), seed=seed, **greedy).learn(60).get_parameters() for seed in (1, 2)]
    compared = []

    class Load(BaseCallback):
        def _on_step(self):
            if self.n_calls > 2:
                sums = slow_logit_sums(model.policy, th.as_tensor(model._last_obs))
                compared.append((self.locals["actions"].item(), sums.argmax().item()))
            return True

        def load(self):
            model.set_parameters(parameters[self.n_calls % 2])

    setattr(Load, hook, Load.load)
    model.learn(60, callback=Load(), reset_num_timesteps=False)
    assert len(compared) > 50 and len(set(compared)) > 1
    assert all(taken == best for taken, best in compared)


@pytest.mark.filterwarnings("ignore:The last trajectory in the replay buffer will be truncated")
def test_second_learn_with_and_without_reset():
    """Neither a reset of the counters nor a truncated last trajectory confuses the cache."""
    for kwargs in (dict(), LOW_MEMORY):
        model = make_model(vec_env(), buffer_size=30, logit_cache=True, **kwargs)
        for reset in (True, False, True):
            model.learn(50, reset_num_timesteps=reset)
            assert largest_error(model) < 1e-4


class NumberedEpisodes(gym.Env):
    """Observes the number of the episode, which also is the reward; episodes do not end."""

    observation_space, action_space, episode = spaces.Box(-1, 1e6, (1,)), spaces.Discrete(2), 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        return np.array([self.episode], dtype=np.float32), {}

    def step(self, action):
        return np.array([self.episode], dtype=np.float32), float(self.episode), False, False, {}


@pytest.mark.parametrize("kwargs", [dict(n_steps=3, gamma=1.0), LOW_MEMORY, NO_TIMEOUTS, dict()])
@pytest.mark.parametrize("how", ["reset", "set_env", "load"])
def test_targets_do_not_reach_over_episodes(how, kwargs, tmp_path):
    """
    Not in n-step returns, and not where the next observation is the next row: if the counters or the environment are
    reset, or the buffer is loaded into a model that is within another episode.
    """
    env = NumberedEpisodes()
    model = make_model(env, buffer_size=1000, **kwargs).learn(40)
    if how == "load":
        model.save_replay_buffer(tmp_path / "buffer")
        model = make_model(env, buffer_size=1000, **kwargs).learn(10)
        model.load_replay_buffer(tmp_path / "buffer")
    else:
        model.set_env(env)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # SB3 announces a truncated trajectory
        model.learn(20, reset_num_timesteps=how == "reset")
    batch = model.replay_buffer._get_samples(np.arange(57))
    n_steps = [min(model.n_steps, 40 - i) if i < 40 else model.n_steps for i in range(57)]
    assert th.equal(batch.rewards, batch.observations * th.tensor(n_steps)[:, None])
    last = 1.0 if kwargs is LOW_MEMORY else 0.0  # elsewhere, its own next observation is stored
    assert batch.dones.flatten().tolist() == [0.0] * 39 + [last] + [0.0] * 17
    assert (batch.next_observations - batch.observations)[batch.dones == 0].count_nonzero() == 0


class NumberedSteps(NumberedEpisodes):
    """Observes the number of steps since the first reset; each reset skips 100."""

    n_steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n_steps += 100
        return np.array([self.n_steps], dtype=np.float32), {}

    def step(self, action):
        self.n_steps += 1
        return np.array([self.n_steps], dtype=np.float32), 0.0, False, False, {}


def test_a_step_that_a_callback_stops_leaves_no_gap():
    """SB3 does not store it: the next transition begins where the environment is."""
    model = make_model(NumberedSteps(), buffer_size=1000)
    for _ in range(3):
        n = model.num_timesteps + 10
        model.learn(100, callback=lambda locals_, globals_, n=n: model.num_timesteps < n, reset_num_timesteps=False)
    buffer = model.replay_buffer
    assert model.num_timesteps == 30 and buffer.pos == 27
    assert (buffer.next_observations[:27] == buffer.observations[:27] + 1).all()


class Endless(OneStateEnv):
    def step(self, action):
        obs, reward, *_ = super().step(action)
        return obs, reward, False, False, {}


@pytest.mark.parametrize("n_steps", [1, 3])
def test_real_ends_stay_real_ends_when_the_environments_are_reset(n_steps):
    """Only the episode that goes on is cut off by the next call: where one has just terminated, nothing follows."""
    envs = [lambda: OneStateEnv(truncates=False), lambda: OneStateEnv(truncates=True), lambda: Endless(truncates=False)]
    model = make_model(DummyVecEnv(envs), buffer_size=300, n_steps=n_steps).learn(60)
    model.learn(30)
    buffer = model.replay_buffer
    assert buffer.dones[19].tolist() == [1, 1, 1]
    assert buffer.timeouts[19].tolist() == [0, 1, 1]
    assert (buffer.timeouts[:30, 0] == 0).all()


@pytest.mark.parametrize("interrupted_at", range(1, 7))
def test_interrupted_follow(interrupted_at, monkeypatch):
    """Ctrl-C after any part of the remembered states: all is forgotten, and learning goes on as if nothing were."""
    monkeypatch.setattr(cache_file, "FOLLOW_ROWS", 30)
    model = make_cached(buffer_size=100, average_window=0.01).learn(100)
    cache, obs = model.replay.cache, model.replay.sample(64).next_observations
    randomise(model.policy.critics, 0)
    update, deleted = model.policy.push_critics(1.0, 0.1)
    q_values, calls = model.policy.q_values, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == interrupted_at:
            raise KeyboardInterrupt
        return q_values(*args)

    monkeypatch.setattr(model.policy, "q_values", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.replay.follow(update, deleted)
    monkeypatch.undo()
    assert relative_error(cache.logit_sums(obs), slow_logit_sums(model.policy, obs)) < 1e-5
    model.learn(30, reset_num_timesteps=False)
    assert len(cache) > 30
    assert largest_error(model) < 1e-4


def test_interrupted_while_sums_are_written(monkeypatch):
    """Ctrl-C between the states and their sums: none of those that are kept or saved is wrong."""
    model = make_model(RandomObsEnv())
    grow(model, 3)
    cache, obs = LogitCache(model.policy, 10), sample_obs(model.observation_space, 20)
    cache.logit_sums(obs[:10])
    map_fields, calls = cache_file.map_fields, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return map_fields(*args)

    monkeypatch.setattr(cache_file, "map_fields", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.logit_sums(obs[10:15])
    monkeypatch.undo()
    loaded = LogitCache(model.policy, 10)
    loaded.load_state_dict(cache.state_dict())
    assert relative_error(loaded.logit_sums(obs), slow_logit_sums(model.policy, obs)) < 1e-5
    randomise(model.policy.critics, 9)
    update, deleted = model.policy.push_critics(1.0, 0.1)
    cache.follow(update, model.policy.frozen_critics.newest, deleted)
    for part in (obs[10:], obs[:10]):
        assert relative_error(cache.logit_sums(part), slow_logit_sums(model.policy, part)) < 1e-5


def test_transitions_for_another_buffer():
    """What is collected for it is not remembered, and the actions are still those of the policy."""
    greedy = dict(kl_coef=1e-7, ent_coef=1e-7, exploration_initial_eps=0.0, exploration_final_eps=0.0)
    model = make_cached(**greedy).learn(100)
    before = model.replay.cache.state_dict()
    other = ReplayBuffer(50, model.observation_space, model.action_space, device="cpu")
    train_freq = TrainFreq(50, TrainFrequencyUnit.STEP)
    model.collect_rollouts(model.env, model._init_callback(None), train_freq, other)
    after = model.replay.cache.state_dict()
    assert other.full and before.keys() == after.keys() != set()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    expected, _ = model.policy.predict(other.observations[:, 0], deterministic=True)
    assert np.array_equal(other.actions[:, 0, 0], expected)


# Fingerprints


def n_distinct(obs):
    keys = fingerprints(obs)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    return len(set(keys))


def test_fingerprints_tell_structured_states_apart():
    """Where few bits differ, and always the same ones: signs, digits, single bits, pixels, orders."""
    generator = np.random.default_rng(0)
    signs = generator.choice(np.array([-1, 1], np.float32), size=(400_000, 64))
    assert n_distinct(th.as_tensor(signs)) == 400_000
    zeros_and_ones = np.array(list(itertools.product([0, 1], repeat=16)))
    for dtype in (np.float32, np.float64, np.uint8, np.int64):
        assert n_distinct(th.as_tensor(zeros_and_ones.astype(dtype))) == 2**16
    digits = np.array(list(itertools.product(range(-4, 4), repeat=5)), np.float32)
    assert n_distinct(th.as_tensor(digits)) == 8**5
    permutations = np.array(list(itertools.permutations(range(8))), np.float32)
    assert n_distinct(th.as_tensor(permutations)) == 40_320
    bits = (1 << np.arange(32, dtype=np.uint32))[:, None, None] * np.eye(50, dtype=np.uint32)
    words = generator.integers(2**32, size=50, dtype=np.uint32)
    flipped = np.concatenate([words ^ bits.reshape(-1, 50), words[None]])
    assert n_distinct(th.as_tensor(flipped.view(np.int32))) == 1601
    assert n_distinct(th.as_tensor(np.arange(100_000, dtype=np.int64)[:, None])) == 100_000


@pytest.mark.parametrize("shape", [(1, 5, 7), (4, 84, 84)])
def test_fingerprints_of_images(shape):
    """One brighter pixel, two that are exchanged, a shifted row, another background."""
    image = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    flat = np.repeat(image.reshape(1, -1), 3 * image.size if image.size < 100 else 300, axis=0)
    n = len(flat) // 3
    pixels = np.linspace(0, image.size - 1, n).astype(int)
    for i, pixel in enumerate(pixels):
        flat[i, pixel] ^= 1
        flat[n + i, pixel] = ~flat[n + i, pixel]
        flat[2 * n + i] = np.roll(flat[2 * n + i], i + 1)
    n_images = len({row.tobytes() for row in flat})
    assert n_images > 2.9 * n
    assert n_distinct(th.as_tensor(flat.reshape(-1, *shape))) == n_images


def test_fingerprints_of_dictionaries():
    """Every combination of small numbers under several keys, which are not interchangeable."""
    numbers = np.array(list(itertools.product(range(40), repeat=3)))
    for dtype in (np.int64, np.float32, np.uint8):
        parts = {key: th.as_tensor(numbers[:, [i]].astype(dtype)) for i, key in enumerate("abc")}
        assert n_distinct(parts) == 40**3
    vectors = th.as_tensor(np.random.default_rng(0).normal(size=(1000, 2, 5)).astype(np.float32))
    straight = fingerprints(dict(a=vectors[:, 0], b=vectors[:, 1]))
    swapped = fingerprints(dict(a=vectors[:, 1], b=vectors[:, 0]))
    assert len({*straight, *swapped}) == 2000


def test_fingerprints_depend_on_nothing_but_the_content():
    """Not on the batch, nor on how it lies in memory, nor on the order of a dictionary."""
    obs = sample_obs(spaces.Box(-1, 1, (3, 5), np.float32), 20)
    keys = fingerprints(obs)
    assert keys == [fingerprints(row[None])[0] for row in obs]
    assert fingerprints(obs.flip(0)) == keys[::-1]
    assert fingerprints(obs.transpose(1, 2).contiguous().transpose(1, 2)) == keys
    vectors = dict(b=obs[:, 0], a=obs[:, 1:])
    assert fingerprints(vectors) == fingerprints(dict(reversed(vectors.items())))


# What is stored


@pytest.mark.parametrize("buffer", ["plain", "dict", "low_memory"])
def test_state_of_the_cache(buffer):
    """What was saved by one process is, bit by bit, what another one goes on with."""
    model = make_cached(buffer, n_envs=2, buffer_size=100).learn(160)
    file = io.BytesIO()
    np.savez(file, **model.replay.cache.state_dict())
    file.seek(0)
    state = dict(np.load(file))
    other = make_cached(buffer, n_envs=2, buffer_size=100, seed=1)
    other.policy.load_state_dict(model.policy.state_dict())
    other.replay.cache.load_state_dict({**state, "keys": np.zeros(100, np.uint64)})  # which files of before have
    again = other.replay.cache.state_dict()
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[key], state[key]) and again[key].dtype == state[key].dtype for key in state)
    assert len(other.replay.cache) == len(model.replay.cache) == 100

    # Both do the same from then on
    states = []
    for policy, cache in [(model.policy, model.replay.cache), (other.policy, other.replay.cache)]:
        randomise(policy.critics, 7)
        update, deleted = policy.push_critics(1.0, 0.3)
        cache.follow(update, policy.frozen_critics.newest, deleted)
        states.append(cache.state_dict())
    assert states[0].keys() == state.keys()
    assert all(np.array_equal(states[0][key], states[1][key]) for key in state)


def test_a_pickled_model_knows_its_sums_in_another_process(tmp_path):
    """Python hashes differently there."""
    model = make_cached("dict").learn(100)
    obs = {key: th.as_tensor(x[:80, 0]) for key, x in model.replay_buffer.next_observations.items()}
    with (tmp_path / "model").open("wb") as file:
        pickle.dump((model, obs), file)
    code = (
        "import pickle, sys; model, obs = pickle.load(open(sys.argv[1], 'rb')); cache, sums = model.replay.cache, []; "
        "model.policy.logit_sums = sums.append; cache.logit_sums(obs); print(len(cache), len(sums))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    env = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert output.split() == [str(len(model.replay.cache)), "0"]


def test_a_deep_copy_learns_as_the_original():
    model = make_cached().learn(100)
    parameters = []
    for each in (copy.deepcopy(model), model):
        each.set_random_seed(3)
        each.learn(60, reset_num_timesteps=False)
        parameters.append(each.get_parameters()["policy"])
    for name, value in parameters[0].items():
        assert th.equal(value, parameters[1][name]), name


def test_state_of_a_cache_that_was_cleared():
    """It holds what is remembered since."""
    model = make_cached(buffer_size=100).learn(60)
    model.policy.load_state_dict(model.policy.state_dict())
    cache = model.replay.cache
    cache.logit_sums(sample_obs(model.observation_space, 10))
    assert len(cache.state_dict()["sums"]) == len(cache) == 10


def test_state_of_another_stack_or_size_is_left_alone():
    """It is not taken, and what is given then is right."""
    model = make_cached(buffer_size=100).learn(110)
    state = model.replay.cache.state_dict()
    for kwargs, same_stack in [(dict(), False), (dict(buffer_size=50), True), (dict(buffer_size=200), True)]:
        other = make_cached(**{"buffer_size": 100, **kwargs}, seed=1).learn(40)
        if same_stack:
            other.policy.load_state_dict(model.policy.state_dict())
        other.replay.cache.load_state_dict(state)
        assert len(other.replay.cache) == (100 if kwargs == dict(buffer_size=200) else 0)
        assert largest_error(other) < 1e-4
        other.learn(30, reset_num_timesteps=False)
        assert largest_error(other) < 1e-4
    empty = make_cached().replay.cache
    empty.load_state_dict(empty.state_dict())
    assert len(empty) == 0


def test_cache_is_arrays_beside_the_pickled_buffer(tmp_path):
    """The buffer stays SB3's own: one more attribute, loadable without this package, and usable by another agent."""
    model = make_model(vec_env(), buffer_size=5000, policy_update_interval=20, logit_cache=True)
    model.learn(60)
    assert len(model.replay.cache) > 30
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        data = json.loads(archive.read("data"))
        assert not {"_replay", "replay", "replay_buffer"} & set(data)
        assert sum(item.file_size for item in archive.infolist()) < 100_000  # the sums alone have 60,000 bytes
        assert len(archive.read("data")) < 40_000

    model.save_replay_buffer(tmp_path / "buffer.pkl")
    buffer = pickle.loads((tmp_path / "buffer.pkl").read_bytes())
    assert type(buffer) is ReplayBuffer
    own = vars(ReplayBuffer(10, model.observation_space, model.action_space)).keys()
    assert vars(buffer).keys() == own | {"logit_cache"}  # arrays, for an exact resume
    assert all(type(array) is np.ndarray for array in buffer.logit_cache.values())
    code = "import pickle, sys; sys.modules['sb3_staq'] = None; print(pickle.load(open(sys.argv[1], 'rb')).pos)"
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "buffer.pkl")], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "60"

    dqn = DQN(
        "MlpPolicy", vec_env(), policy_kwargs=dict(net_arch=[8]), buffer_size=5000, learning_starts=0, device="cpu"
    )
    dqn.load_replay_buffer(tmp_path / "buffer.pkl")
    dqn.set_logger(model.logger)
    dqn.train(gradient_steps=2, batch_size=8)
    assert dqn._n_updates == 2


def test_buffer_of_another_agent_is_usable():
    """A buffer filled by DQN trains StaQ."""
    dqn = DQN(
        "MlpPolicy", vec_env(), policy_kwargs=dict(net_arch=[8]), buffer_size=100, learning_starts=10, device="cpu"
    )
    dqn.learn(150)
    file = io.BytesIO()
    dqn.save_replay_buffer(file)
    file.seek(0)
    model = make_model(vec_env(), buffer_size=100, logit_cache=True)
    model.learn(60)
    file_obs = dqn.replay_buffer.next_observations
    model.load_replay_buffer(file)
    assert np.array_equal(model.replay_buffer.next_observations, file_obs)
    model.train(gradient_steps=1, batch_size=16)
    assert largest_error(model) < 1e-4


def test_message_at_verbose_says_which_evaluation_is_used(capsys):
    make_model(vec_env(), verbose=1)
    assert "cache" in capsys.readouterr().out
    make_model(vec_env(), verbose=1, logit_cache=False)
    assert "directly" in capsys.readouterr().out
    make_model(vec_env(), verbose=0)
    assert capsys.readouterr().out == ""


def test_loaded_models_do_not_repeat_the_message(capsys, tmp_path):
    make_model(vec_env(), verbose=1).save(tmp_path / "model")
    capsys.readouterr()
    StaQ.load(tmp_path / "model")
    assert "cache" not in capsys.readouterr().out
