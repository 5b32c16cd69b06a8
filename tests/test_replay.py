"""The logit cache against a full recomputation through the stack, in double precision, network by network."""

import io
import json
import pickle
import subprocess
import sys
import zipfile
from typing import NamedTuple

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomObsEnv, make_model, relative_error, slow_log_policy, slow_logit_sums
from stable_baselines3 import DQN, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_staq import StaQ
from sb3_staq.buffers import LogitCache, split_samples

LOW_MEMORY = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))
BUFFERS = {
    "plain": dict(),
    "n_step": dict(n_steps=3),
    "dict": dict(policy="MultiInputPolicy"),
    "discrete": dict(),
    "low_memory": LOW_MEMORY,
    "multi_discrete_actions": dict(),
    "box_actions": dict(action_bins=5),
}
ACTION_SPACES = {
    "multi_discrete_actions": spaces.MultiDiscrete([3, 2]),
    "box_actions": spaces.Box(-2, 3, (2,), np.float32),
}


def vec_env(kind="box", n_envs=1, **kwargs):
    return DummyVecEnv([lambda: RandomObsEnv(kind, **kwargs) for _ in range(n_envs)])


def make_cached(buffer="plain", n_envs=1, **kwargs):
    kind = buffer if buffer in ("dict", "discrete") else "box"
    env = vec_env(kind, n_envs, action_space=ACTION_SPACES.get(buffer))
    return make_model(env, **{"logit_cache": True, **BUFFERS[buffer], **kwargs})


def stored_next_observations(buffer):
    """Preprocessing-ready next observations of all transitions in a buffer, and their rows and environments."""
    rows, envs = np.meshgrid(np.arange(buffer.size()), np.arange(buffer.n_envs), indexing="ij")
    rows, envs = rows.ravel(), envs.ravel()
    if buffer.optimize_memory_usage:
        # One row is being overwritten, and the next observation of an ended episode is not kept by this buffer
        keep = buffer.dones[rows, envs] == 0
        if buffer.full:
            keep &= rows != buffer.pos
        rows, envs = rows[keep], envs[keep]
        rows_of_next = (rows + 1) % buffer.buffer_size
        return th.as_tensor(buffer.observations[rows_of_next, envs]), rows_of_next, envs
    arrays = buffer.next_observations
    if isinstance(arrays, dict):
        return {key: th.as_tensor(array[rows, envs]) for key, array in arrays.items()}, rows, envs
    return th.as_tensor(arrays[rows, envs]), rows, envs


def cache_error(model):
    """Largest deviation of the cache from the recomputation, relative to the largest sum."""
    obs, rows, envs = stored_next_observations(model.replay_buffer)
    return relative_error(model._logit_cache.sums[rows, envs], slow_logit_sums(model.policy, obs))


def sampled_error(model, n_batches=5):
    """The same for what gradient steps get: log-probabilities at the next states of a batch."""
    errors = []
    for batch, actual, _ in model._batches(n_batches, 64):
        logits = model.policy.frozen_critics.weights.scale * slow_logit_sums(model.policy, batch.next_observations)
        direct = slow_log_policy(model.policy, logits)
        if model.optimize_memory_usage:
            alive = (batch.dones == 0).squeeze(1)
            direct, actual = direct[alive], actual[alive]
        errors.append(relative_error(actual, direct))
    return max(errors)


@pytest.mark.parametrize("buffer", ["plain", "n_step", "dict"])
@pytest.mark.parametrize("cached", [True, False])
def test_batches_are_parts_of_few_samples(buffer, cached, monkeypatch):
    """As many batches as are asked for, whole transitions of the buffer, drawn at most 1,024 states at a time."""
    model = make_cached(buffer, n_envs=2, logit_cache=cached).learn(60)
    drawn = []
    sample = model._sample
    monkeypatch.setattr(model, "_sample", lambda size: drawn.append(size) or sample(size))
    batches = list(model._batches(9, 200))
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
    for batch, log_pi, _ in batches:
        assert log_pi.shape == (200, model.policy.branches.n_bins)
        assert (batch.discounts is not None) == (buffer == "n_step")
        if buffer != "n_step":  # whose rewards are sums
            assert {tuple(row) for row in rows(batch.observations, batch.rewards, batch.actions)} <= known


@pytest.mark.parametrize("buffer", ["plain", "dict", "n_step"])
def test_parts_of_samples_stay_in_order(buffer):
    """Side by side, the parts are the whole again, field by field."""
    samples, _ = make_cached(buffer, n_envs=2).learn(60)._sample(70)
    parts = list(split_samples(samples, 20))
    assert [len(part.rewards) for part in parts] == [20, 20, 20, 10]
    for name in samples._fields:
        whole, split = getattr(samples, name), [getattr(part, name) for part in parts]
        if whole is None:
            assert split == [None] * 4
        elif isinstance(whole, dict):
            assert all(th.equal(th.cat([part[key] for part in split]), whole[key]) for key in whole)
        else:
            assert th.equal(th.cat(split), whole)


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
    assert [len(batch.rewards) for batch, *_ in model._batches(3, 16)] == [32] * 3


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
        (dict(buffer_size=10**5, memory_size=1, logit_rule="exact"), True),
    ],
)
def test_automatic_choice_takes_what_costs_less(kwargs, cached):
    assert (make_model(vec_env(), logit_cache="auto", **kwargs)._logit_cache is not None) == cached


def test_negligible_deletions_are_not_evaluated():
    """With weights of 2^-40 and less for the deleted critics, one pass per update is enough, and as exact."""
    model = make_cached(policy_update_interval=10, memory_size=20, kl_coef=0.1, ent_coef=0.3)
    deletions = []
    update = LogitCache.update

    def recorded(self, policy_update, newest, deleted):
        deletions.append(deleted)
        update(self, policy_update, newest, deleted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LogitCache, "update", recorded)
        model.learn(500)
    assert len(deletions) > 40
    assert deletions == [None] * len(deletions)
    assert cache_error(model) < 1e-5


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("buffer", BUFFERS)
def test_cache_equals_recomputation(buffer, n_envs):
    """
    After many policy updates, with the buffer wrapped several times, episodes ended both ways and coefficients that
    change; also what is sampled belongs to the sampled next states.
    """
    model = make_cached(buffer, n_envs, buffer_size=100, kl_coef="lin_3_0.5", ent_coef="lin_0.5_0.05")
    model.learn(450)
    assert model.replay_buffer.full
    assert model._n_policy_updates >= 42
    assert len(model.policy.frozen_critics) == 4
    assert model._logit_cache.sums.abs().max() > 0.1
    assert model.replay_buffer.dones.any()
    if buffer != "low_memory":
        assert model.replay_buffer.timeouts.any()
        assert (model.replay_buffer.dones > model.replay_buffer.timeouts).any()
    assert cache_error(model) < 1e-4
    assert sampled_error(model) < 1e-4


@pytest.mark.parametrize("rule", ["weight_corrected", "truncated", "exact"])
@pytest.mark.parametrize("memory_size", [1, 2, 7, 50])
def test_cache_for_all_memory_sizes_and_rules(memory_size, rule):
    model = make_cached(memory_size=memory_size, logit_rule=rule, policy_update_interval=3, buffer_size=60)
    model.learn(250)
    assert model._n_policy_updates == 76
    assert len(model.policy.frozen_critics) == (76 if rule == "exact" else memory_size)
    assert cache_error(model) < 1e-4
    assert sampled_error(model) < 1e-4


def test_cache_before_the_buffer_is_full():
    """Unused rows of the buffer are neither sampled nor compared: rows in use are right from the first one on."""
    model = make_cached(buffer_size=1000, memory_size=2)
    for _ in range(4):
        model.learn(30, reset_num_timesteps=False)
        if model._n_policy_updates > 0:
            assert cache_error(model) < 1e-4
    assert not model.replay_buffer.full


@pytest.mark.parametrize("n_envs", [1, 3])
def test_cache_with_large_steps_between_policies(n_envs):
    """Critics that change beyond recognition between updates, and Q-values far from zero: the errors stay small."""
    model = make_cached(
        n_envs=n_envs, learning_rate=0.1, reward_scale=100.0, ent_coef=5.0, memory_size=10, buffer_size=90
    )
    model.learn(600)
    assert model._logit_cache.sums.abs().max() > 100
    assert cache_error(model) < 1e-4


@pytest.mark.parametrize("memory_size", [1, 10, 300])
def test_cache_after_a_thousand_updates(memory_size):
    """Rounding errors do not add up, whatever the coefficients do; the buffer is overwritten 13 times."""
    model = make_cached(
        policy_update_interval=1, memory_size=memory_size, buffer_size=80, kl_coef="lin_20_2", ent_coef="lin_0.4_0.1"
    )
    model.learn(1040)
    assert model._n_policy_updates == 1020
    assert len(model.policy.frozen_critics) == memory_size
    buffer = model.replay_buffer
    assert buffer.timeouts.any() and (buffer.dones > buffer.timeouts).any()
    assert cache_error(model) < 1e-4
    assert sampled_error(model) < 1e-4


@pytest.mark.parametrize("n_envs", [1, 3])
def test_acting_uses_the_current_policy(n_envs):
    """The logits that choose actions are those of a direct evaluation at the current observations."""

    class Compare(BaseCallback):
        worst, compared = 0.0, 0

        def _on_step(self):
            known = self.model._last_logit_sums
            if known is not None:
                obs = th.as_tensor(self.model._last_obs)
                expected = slow_logit_sums(self.model.policy, obs)
                if expected.abs().max() > 0:
                    self.worst = max(self.worst, relative_error(known, expected))
                    self.compared += 1
            return True

    for kwargs in (dict(), LOW_MEMORY):
        callback = Compare()
        make_model(vec_env(n_envs=n_envs), **kwargs).learn(200, callback=callback)
        assert callback.compared > 10
        assert callback.worst < 1e-5


# Where the cache is used


def test_direct_evaluation_where_logits_are_not_known_beforehand():
    """HER relabels its transitions and VecNormalize's statistics move: neither uses the cache, both learn."""
    her = make_model(
        BitFlippingEnv(n_bits=3), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer, logit_cache="auto"
    )
    normalized = make_model(VecNormalize(vec_env(n_envs=2)), logit_cache="auto")
    for model in (her, normalized):
        model.learn(100)
        assert model._logit_cache is None
        assert model._n_policy_updates == 8
        assert sampled_error(model) < 1e-4
    for unused in (False, "auto"):
        assert (make_model(vec_env(), logit_cache=unused)._logit_cache is None) == (unused is False)


def test_cache_where_it_cannot_be_used_is_refused():
    for env, policy, kwargs, name in [
        (BitFlippingEnv(n_bits=3), "MultiInputPolicy", dict(replay_buffer_class=HerReplayBuffer), "HerReplayBuffer"),
        (VecNormalize(vec_env()), "MlpPolicy", {}, "VecNormalize"),
    ]:
        with pytest.raises(ValueError, match=rf"logit_cache=True.*{name}"):
            make_model(env, policy, logit_cache=True, **kwargs)


def test_subclasses_of_buffers_are_evaluated_directly():
    """A subclass may hand out other next states than those that were added."""

    class Shuffled(ReplayBuffer):
        pass

    assert make_model(vec_env(), replay_buffer_class=Shuffled)._logit_cache is None
    env_spaces = vec_env().observation_space, vec_env().action_space
    assert LogitCache.supports(ReplayBuffer(10, *env_spaces))
    assert LogitCache.supports(NStepReplayBuffer(10, *env_spaces))
    assert LogitCache.supports(DictReplayBuffer(10, vec_env("dict").observation_space, env_spaces[1]))
    assert not LogitCache.supports(Shuffled(10, *env_spaces))


def test_normalization_that_comes_later_ends_the_use_of_the_cache():
    """``set_env`` with a VecNormalize: the critics see normalised observations from then on."""
    model = make_model(vec_env())
    model.learn(60)
    assert model._logit_cache is not None
    env = VecNormalize(vec_env())
    env.obs_rms.mean += 10.0
    env.training = False
    model.set_env(env)
    model.learn(60)
    assert model._logit_cache is None
    batch, _ = model._sample(64)
    assert batch.next_observations.mean() < -5

    model = make_model(vec_env(), logit_cache=True)
    model.set_env(VecNormalize(vec_env()))
    with pytest.raises(ValueError, match=r"logit_cache=True.*VecNormalize"):
        model.learn(60)


@pytest.mark.parametrize(
    ("buffer", "n_envs", "n_steps"),
    [
        ("plain", 1, 3000),
        ("plain", 3, 6000),
        ("n_step", 3, 3000),
        ("dict", 3, 3000),
        ("low_memory", 3, 3000),
        ("box_actions", 3, 3000),
        pytest.param("plain", 4, 20_000, marks=pytest.mark.slow),
    ],
)
def test_same_actions_with_and_without_cache(buffer, n_envs, n_steps):
    """The cache changes how things are computed, not what: from one seed, the same actions for thousands of steps."""
    actions, parameters = {}, {}
    for logit_cache in (True, False):
        env = vec_env(buffer if buffer == "dict" else "box", n_envs, action_space=ACTION_SPACES.get(buffer))
        kwargs = dict(learning_rate=1e-3, gradient_steps=1, train_freq=4, policy_update_interval=100, buffer_size=1000)
        model = make_model(env, logit_cache=logit_cache, **{**BUFFERS[buffer], **kwargs})
        model.learn(n_steps)
        actions[logit_cache] = [single.actions for single in env.envs]
        parameters[logit_cache] = th.cat([param.flatten() for param in model.policy.critics.parameters()])
        assert (model._logit_cache is not None) == logit_cache
        assert model._n_policy_updates == (n_steps - 20) // 100
    assert sum(map(len, actions[True])) == n_steps
    assert actions[True] == actions[False]
    assert relative_error(parameters[True], parameters[False]) < 1e-3


# Transitions that did not come through the training loop


def add_by_hand(model, n):
    """Fill a replay buffer from outside, as with demonstrations; actions and rewards as in the transition before."""
    buffer = model.replay_buffer
    space = model.observation_space
    for _ in range(n):
        obs, next_obs = (np.stack([space.sample() for _ in range(buffer.n_envs)]) for _ in range(2))
        action, reward = buffer.actions[buffer.pos - 1].copy(), buffer.rewards[buffer.pos - 1].copy()
        buffer.add(obs, next_obs, action, reward, np.zeros(buffer.n_envs), [{}] * buffer.n_envs)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("n_added", [1, 7, 30, 60])
@pytest.mark.parametrize("then", ["sample", "learn"])
def test_transitions_added_by_hand(then, n_added, n_envs):
    """They lead to a rebuild, also when the buffer (30 rows) has been filled exactly; the cache is right ever after."""
    model = make_model(vec_env(n_envs=n_envs), buffer_size=30 * n_envs)
    model.learn(90 * n_envs)
    assert (model.replay_buffer.pos, model.replay_buffer.full) == (0, True)
    add_by_hand(model, n_added)
    if then == "sample":
        assert sampled_error(model) < 1e-4
        assert cache_error(model) < 1e-4
    model.learn(8 * n_envs, reset_num_timesteps=False)
    assert cache_error(model) < 1e-4
    model.learn(30, reset_num_timesteps=False)
    assert cache_error(model) < 1e-4


def test_transitions_added_by_hand_before_learning():
    model = make_model(vec_env(), buffer_size=30, learning_starts=0)
    add_by_hand(model, 30)
    model.learn(25)
    assert model._n_policy_updates == 2
    assert cache_error(model) < 1e-4


@pytest.mark.parametrize("n_steps", [90, 97])
def test_loaded_replay_buffer(n_steps, tmp_path):
    """
    Rebuilt after loading, whether the buffer (30 rows) has just wrapped or not, both for ``train`` at once and for
    ``learn``; a full buffer of another model likewise.
    """
    model = make_model(vec_env(), buffer_size=30)
    model.learn(n_steps)
    assert (model.replay_buffer.pos == 0) == (n_steps == 90)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")

    loaded = StaQ.load(tmp_path / "model", env=vec_env())
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.set_logger(model.logger)
    loaded.train(gradient_steps=1, batch_size=16)
    assert sampled_error(loaded) < 1e-4
    assert cache_error(loaded) < 1e-4
    loaded.learn(25, reset_num_timesteps=False)
    assert cache_error(loaded) < 1e-4

    other = make_model(vec_env(), buffer_size=30, seed=1)
    other.learn(90)
    other.load_replay_buffer(tmp_path / "buffer")
    other.train(gradient_steps=1, batch_size=16)
    assert sampled_error(other) < 1e-4
    assert cache_error(other) < 1e-4


OTHER_PARAMETERS = {
    "set_parameters": lambda model, other: model.set_parameters(other.get_parameters()),
    "load_state_dict": lambda model, other: model.policy.load_state_dict(other.policy.state_dict()),
    "load_state_dict without weights": lambda model, other: model.policy.load_state_dict(
        {key: value for key, value in other.policy.state_dict().items() if isinstance(value, th.Tensor)}, strict=False
    ),
    "load_from_vector": lambda model, other: model.policy.load_from_vector(other.policy.parameters_to_vector()),
}


@pytest.mark.parametrize("way", OTHER_PARAMETERS)
@pytest.mark.parametrize("n_steps", [90, 97])
def test_other_parameters_lead_to_a_rebuild(n_steps, way):
    model = make_model(vec_env(), buffer_size=30)
    model.learn(n_steps)
    other = make_model(vec_env(), buffer_size=30, seed=1)
    other.learn(60)
    OTHER_PARAMETERS[way](model, other)
    assert sampled_error(model) < 1e-4
    assert cache_error(model) < 1e-4


def test_another_policy_leads_to_a_rebuild():
    model = make_model(vec_env(), buffer_size=30).learn(90)
    model.policy = make_model(vec_env(), buffer_size=30, seed=1).learn(60).policy
    model.train(gradient_steps=1, batch_size=16)
    assert sampled_error(model) < 1e-4
    assert cache_error(model) < 1e-4


@pytest.mark.parametrize("hook", ["_on_rollout_start", "_on_rollout_end"])
def test_actions_follow_parameters_loaded_between_rollouts(hook):
    """The sums at the last observations, which came from the stack before, are not used any more."""
    model = make_model(vec_env(), buffer_size=300)
    other = make_model(vec_env(), buffer_size=300, seed=1).learn(60)

    were_known = []

    class Load(BaseCallback):
        def _on_step(self):
            return True

        def load(self):
            were_known.append(model._known_logit_sums() is not None)
            model.set_parameters(other.get_parameters())
            assert model._known_logit_sums() is None

    setattr(Load, hook, Load.load)
    model.learn(60, callback=Load())
    assert len(were_known) == 60 and sum(were_known) > 20


@pytest.mark.filterwarnings("ignore:The last trajectory in the replay buffer will be truncated")
def test_second_learn_with_and_without_reset():
    """Neither a reset of the counters nor a truncated last trajectory confuses the cache."""
    for kwargs in (dict(), LOW_MEMORY):
        model = make_model(vec_env(), buffer_size=30, **kwargs)
        for reset in (True, False, True):
            model.learn(50, reset_num_timesteps=reset)
            assert cache_error(model) < 1e-4
            assert sampled_error(model) < 1e-4


# What is stored


def test_cache_is_neither_in_the_zip_nor_in_the_pickled_buffer(tmp_path):
    """The buffer stays SB3's own: same attributes, loadable where this package is not, and usable by another agent."""
    model = make_model(vec_env(), buffer_size=5000, policy_update_interval=20, logit_cache=True)
    model.learn(60)
    assert model._logit_cache.sums.abs().max() > 0
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        data = json.loads(archive.read("data"))
        assert not {"_logit_cache", "_last_logit_sums", "replay_buffer"} & set(data)
        assert sum(item.file_size for item in archive.infolist()) < 100_000  # the sums alone have 60,000 bytes
        assert len(archive.read("data")) < 40_000

    model.save_replay_buffer(tmp_path / "buffer.pkl")
    buffer = pickle.loads((tmp_path / "buffer.pkl").read_bytes())
    assert type(buffer) is ReplayBuffer
    assert vars(buffer).keys() == vars(ReplayBuffer(10, model.observation_space, model.action_space)).keys()
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
    model = make_model(vec_env(), buffer_size=100)
    model.learn(60)
    file_obs = dqn.replay_buffer.next_observations
    model.load_replay_buffer(file)
    assert np.array_equal(model.replay_buffer.next_observations, file_obs)
    model.train(gradient_steps=1, batch_size=16)
    assert cache_error(model) < 1e-4


def test_an_interrupted_sample_leaves_the_buffer_as_it_was():
    """Sampling watches the buffer; an error in between (nothing to sample from yet) must not leave traces."""
    model = make_model(vec_env("dict"), "MultiInputPolicy")
    arrays = dict(model.replay_buffer.next_observations)
    with pytest.raises(ValueError):
        model._sample(8)
    assert model.replay_buffer.next_observations.keys() == arrays.keys()
    assert all(model.replay_buffer.next_observations[key] is array for key, array in arrays.items())


@pytest.mark.parametrize("by", ["interruption", "hand"])
def test_an_update_that_the_cache_missed_leads_to_a_rebuild(by, monkeypatch):
    """Ctrl-C while the cache follows a policy update, or critics that are pushed by hand, and then going on."""
    model = make_cached(buffer_size=200).learn(100)
    if by == "hand":
        model.policy.push_critics(1.0, 0.1)
    else:

        def interrupted(self, update, newest, deleted):
            raise KeyboardInterrupt

        monkeypatch.setattr(LogitCache, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.learn(50, reset_num_timesteps=False)
        monkeypatch.undo()
    assert not model._logit_cache.in_sync
    assert cache_error(model) > 1e-2
    model.learn(30, reset_num_timesteps=False)
    assert cache_error(model) < 1e-4


def test_transitions_for_another_buffer():
    """What is collected for it does not touch the cache, and the actions are still those of the policy."""
    # So greedy that the actions are known
    greedy = dict(kl_coef=1e-7, ent_coef=1e-7, exploration_initial_eps=0.0, exploration_final_eps=0.0)
    model = make_cached(**greedy).learn(100)
    before = model._logit_cache.sums.clone()
    other = ReplayBuffer(50, model.observation_space, model.action_space, device="cpu")
    train_freq = TrainFreq(50, TrainFrequencyUnit.STEP)
    model.collect_rollouts(model.env, model._init_callback(None), train_freq, other)
    assert other.full and th.equal(model._logit_cache.sums, before)
    expected, _ = model.policy.predict(other.observations[:, 0], deterministic=True)
    assert np.array_equal(other.actions[:, 0, 0], expected)


def test_message_at_verbose_says_which_evaluation_is_used(capsys):
    make_model(vec_env(), verbose=1)
    assert "cache" in capsys.readouterr().out
    make_model(vec_env(), verbose=1, logit_cache=False)
    assert "directly" in capsys.readouterr().out
    make_model(vec_env(), verbose=0)
    assert capsys.readouterr().out == ""
