"""The diagnostics of policy updates: every number against the definitions written out, and a file that survives."""

import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomObsEnv, make_model, slow_q_values
from stable_baselines3 import DQN, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_staq import StaQ
from sb3_staq.callbacks import PolicyUpdateDiagnostics
from sb3_staq.plotting import plot_diagnostics, read_diagnostics

CUSTOM = [2.0, -1.0, 0.0, 3.0]


def box_env():
    return RandomObsEnv(action_space=spaces.Box(-1, 1, (2,), np.float32))


HER = dict(replay_buffer_class=HerReplayBuffer, gradient_steps=1)
TINY_FEATURES = dict(features_extractor_kwargs=dict(features_dim=4))
CASES = {
    "discrete": lambda: make_model(RandomObsEnv(), ent_coef="lin_0.5_0.05", kl_coef="lin_2_0.5"),
    "no cache": lambda: make_model(RandomObsEnv(), logit_cache=False),
    "branches": lambda: make_model(RandomObsEnv(action_space=spaces.MultiDiscrete([2, 3, 1])), logit_rule="truncated"),
    "bits": lambda: make_model(RandomObsEnv(action_space=spaces.MultiBinary(3)), critic_reduction="min"),
    "box": lambda: make_model(DummyVecEnv([box_env] * 2), memory_size=1),
    "joint": lambda: make_model(box_env(), critic="joint", ent_coef="auto", kl_coef="rel_1.0"),
    "exact": lambda: make_model(RandomObsEnv(), logit_rule="exact"),
    "custom": lambda: make_model(RandomObsEnv(action_space=spaces.MultiDiscrete([2, 3])), logit_rule=CUSTOM),
    "no entropy": lambda: make_model(RandomObsEnv(), logit_rule="truncated", ent_coef=0.0),
    "dict": lambda: make_model(DummyVecEnv([lambda: RandomObsEnv("dict")] * 3), "MultiInputPolicy"),
    "image": lambda: make_model(RandomObsEnv("image"), "CnnPolicy", policy_kwargs=TINY_FEATURES, gradient_steps=1),
    "states": lambda: make_model(RandomObsEnv("discrete"), n_steps=3),
    "normalized": lambda: make_model(VecNormalize(DummyVecEnv([RandomObsEnv] * 2)), buffer_size=40),
    "her": lambda: make_model(make_vec_env(BitFlippingEnv, 2), "MultiInputPolicy", **HER),
    "low memory": lambda: make_model(
        RandomObsEnv(),
        buffer_size=50,
        optimize_memory_usage=True,
        replay_buffer_kwargs=dict(handle_timeout_termination=False),
    ),
}


def logits_written_out(rule, memory_size, coefs, q_values):
    """The logits from the definition, for the Q-functions and (kl_coef, ent_coef) of all updates so far."""
    n = len(q_values)
    if n == 0:
        return 0.0
    if not isinstance(rule, str):
        return sum(rule[age] * q_values[n - 1 - age] for age in range(min(n, memory_size)))
    kl, ent = coefs[-1]
    factor = 1 / (kl + ent)
    if rule == "weight_corrected":
        factor /= 1 - (kl / (kl + ent)) ** memory_size
    first = 0 if rule == "exact" else max(0, n - memory_size)
    betas = [kl / (kl + ent) for kl, ent in coefs]
    return sum(factor * np.prod(betas[i + 1 :]) * q_values[i] for i in range(first, n))


class WrittenOut(BaseCallback):
    """All of the diagnostics from the definitions, on all stored states, critic by critic in double precision."""

    def _on_training_start(self):
        self.coefs, self.critics, self.rows, self.memory_size = [], [], [], self.model.memory_size
        self.model.policy_update_hooks.append(self._note)

    def _on_step(self):
        return True

    def _stored_states(self):
        buffer, env = self.model.replay_buffer, self.model.get_vec_normalize_env()

        def flat(array):
            return array[: buffer.size()].reshape(-1, *array.shape[2:])

        stored = buffer.observations
        obs = {key: flat(array) for key, array in stored.items()} if isinstance(stored, dict) else flat(stored)
        if env is not None:
            obs = np.clip(
                (obs - env.obs_rms.mean) / np.sqrt(env.obs_rms.var + env.epsilon), -env.clip_obs, env.clip_obs
            )
        obs = {key: th.as_tensor(x) for key, x in obs.items()} if isinstance(obs, dict) else th.as_tensor(obs)
        return preprocess_obs(obs, self.model.observation_space)

    def _note(self, info):
        kl_coef, ent_coef = info.kl_coef, info.ent_coef
        model, rule, memory_size = self.model, self.model.logit_rule, self.model.memory_size
        self.coefs.append((kl_coef, ent_coef))
        self.critics.append(model.policy.additive_critics.frozen_copy())
        obs = self._stored_states()
        q_values = [slow_q_values(critics, obs).numpy() for critics in self.critics]
        xi = logits_written_out(rule, memory_size, self.coefs, q_values)
        old_size, self.memory_size = self.memory_size, memory_size
        old = logits_written_out(rule, old_size, self.coefs[:-1], q_values[:-1]) + np.zeros_like(xi)
        overflows = rule != "exact" and len(q_values) > memory_size
        kept = xi
        if overflows and isinstance(rule, str):
            n_deleted = min(len(q_values) - 1, old_size) + 1 - memory_size
            kept = logits_written_out(rule, memory_size + n_deleted, self.coefs, q_values)

        # The stack is linear in each critic: a critic's weight is what a unit Q-function gives
        ones = [np.zeros(len(q_values)) for _ in q_values]
        for i, one in enumerate(ones):
            one[i] = 1.0
        weights = logits_written_out(rule, memory_size, self.coefs, ones)
        row = dict(kl=0.0, lost_kl=0.0, entropy=0.0)
        most, gaps, shares, start = 0.0, [], np.zeros(len(q_values)), 0
        for size in model.policy.branches.sizes:
            columns = slice(start, start + size)
            start += size
            pi, pi_old, pi_kept = (
                np.exp(x[:, columns]) / np.exp(x[:, columns]).sum(axis=1, keepdims=True) for x in (xi, old, kept)
            )
            row["kl"] += (pi * np.log(pi / pi_old)).sum(axis=1).mean()
            row["lost_kl"] += (pi * np.log(pi / pi_kept)).sum(axis=1).mean()
            row["entropy"] -= (pi * np.log(pi)).sum(axis=1).mean()
            most += np.log(size)
            if size > 1:
                ordered = np.sort(xi[:, columns], axis=1)
                gaps.append((ordered[:, -1] - ordered[:, -2]).mean() / np.abs(weights).sum())
            for i, q in enumerate(q_values):
                shares[i] += abs(weights[i]) * np.abs(q[:, columns] - q[:, columns].mean(axis=1, keepdims=True)).sum()
        row["entropy"] /= most
        row["action_gap"] = np.mean(gaps)
        if overflows and not isinstance(rule, str):
            row["lost_kl"] = np.nan
        newest_first = shares[::-1] if rule == "exact" else shares[::-1][:memory_size]
        row["shares"] = newest_first / newest_first.sum()
        self.rows.append(dict(row, step=model.num_timesteps, kl_coef=kl_coef, ent_coef=ent_coef))


@pytest.mark.parametrize("name", CASES)
def test_every_number(name, tmp_path):
    model, expected = CASES[name](), WrittenOut()
    callback = PolicyUpdateDiagnostics(tmp_path / "new_folder" / "log.csv", n_states=10**6)
    model.learn(110, callback=[callback, expected])
    data = read_diagnostics(callback.path)
    assert len(data) == len(expected.rows) == 9
    assert list(data["policy_update"]) == list(range(1, 10))
    for (_, row), numbers in zip(data.iterrows(), expected.rows, strict=True):
        assert row["step"] == numbers["step"]
        for column in ("kl", "lost_kl", "entropy", "action_gap", "kl_coef", "ent_coef"):
            actual = pytest.approx(row[column], rel=1e-3, abs=1e-8, nan_ok=True)
            assert numbers[column] == actual, (row["policy_update"], column)
        np.testing.assert_allclose(row["shares"], numbers["shares"], rtol=1e-4, atol=1e-6)
    # They are of a size at which an error shows
    assert (data["kl"] > 1e-6).all()
    assert data["entropy"].between(0, 1).all()
    assert data["entropy"].min() < 0.999
    assert (data["action_gap"] > 0).all()
    lost = data["lost_kl"].iloc[4:]
    assert lost.isna().all() if name == "custom" else (lost == 0).all() if name == "exact" else (lost > 0).all()
    assert (data["lost_kl"].iloc[: 1 if name == "box" else 4] == 0).all()


@pytest.mark.parametrize("name", ["discrete", "no cache", "branches", "image", "normalized", "her"])
def test_same_training_with_and_without(name, tmp_path):
    """Same actions, same parameters, same state of the random generators."""
    results = []
    for callback in (None, PolicyUpdateDiagnostics(tmp_path / "log.csv", n_states=7)):
        model = CASES[name]().learn(80, callback=callback)
        params = th.cat([param.detach().flatten() for param in model.policy.parameters()])
        results.append([model.replay_buffer.actions.copy(), params, np.random.random(3), th.rand(3)])
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert len(read_diagnostics(tmp_path / "log.csv")) == 6


def test_several_policy_updates_in_one_training_phase(tmp_path):
    model, expected = make_model(RandomObsEnv(), train_freq=30, policy_update_interval=7, memory_size=2), WrittenOut()
    model.learn(90, callback=[PolicyUpdateDiagnostics(tmp_path / "log.csv", n_states=1000), expected])
    data = read_diagnostics(tmp_path / "log.csv")
    assert list(data["policy_update"]) == list(range(1, 11))
    assert list(data["step"]) == [30] + [60] * 4 + [90] * 5
    for column in ("kl", "lost_kl"):
        np.testing.assert_allclose(data[column], [row[column] for row in expected.rows], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("rule", ["weight_corrected", "truncated"])
def test_memory_that_is_made_smaller(rule, tmp_path):
    """One policy update deletes several critics: lost_kl is that of all of them together."""

    class Smaller(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 75:
                self.model.memory_size = 2
            return True

    model, expected = make_model(RandomObsEnv(), logit_rule=rule), WrittenOut()
    callback = PolicyUpdateDiagnostics(tmp_path / "log.csv", n_states=1000)
    model.learn(110, callback=[callback, expected, Smaller()])
    data = read_diagnostics(callback.path)
    assert list(data["shares"].map(len)) == [1, 2, 3, 4, 4, 2, 2, 2, 2]
    for column in ("kl", "lost_kl", "entropy", "action_gap"):
        np.testing.assert_allclose(data[column], [row[column] for row in expected.rows], rtol=1e-3, atol=1e-8)


def test_average_policy_is_no_matter(tmp_path):
    """The numbers are those of the policy that learns, whatever is delivered, and whatever else the stack keeps."""
    model, expected = make_model(RandomObsEnv(), eval_policy="average", average_window=1.0, memory_size=2), WrittenOut()
    model.learn(110, callback=[PolicyUpdateDiagnostics(tmp_path / "log.csv", n_states=1000), expected])
    assert len(model.policy.frozen_critics) == 9
    data = read_diagnostics(tmp_path / "log.csv")
    for column in ("kl", "lost_kl", "entropy", "action_gap"):
        np.testing.assert_allclose(data[column], [row[column] for row in expected.rows], rtol=1e-3, atol=1e-8)
    assert list(data["shares"].map(len)) == [1] + [2] * 8


def test_states_are_spread_over_the_buffer():
    """Evenly in each environment, all of them if there are fewer; the same ones each time."""
    model = make_model(DummyVecEnv([RandomObsEnv] * 3), buffer_size=3 * 40)
    callback = PolicyUpdateDiagnostics("not written", n_states=12)
    callback.init_callback(model)
    for n_steps, n_used in [(6, 6), (60, 12), (150, 12)]:  # filling up to the last one, 40 rows
        model.learn(n_steps)
        used = callback._observations().numpy()
        assert np.array_equal(used, callback._observations().numpy())
        stored = model.replay_buffer.observations[: model.replay_buffer.size()]
        places = np.array([np.argwhere((stored == obs).all(axis=-1))[0] for obs in used])
        assert len(places) == n_used
        assert list(np.bincount(places[:, 1])) == [n_used // 3] * 3
        if n_used == 12:
            for env in range(3):
                rows = places[places[:, 1] == env][:, 0]
                assert (np.diff(rows) > len(stored) / 6).all()


def test_nothing_to_choose(tmp_path):
    model = make_model(RandomObsEnv(n_actions=1))
    model.learn(50, callback=PolicyUpdateDiagnostics(tmp_path / "log.csv"))
    data = read_diagnostics(tmp_path / "log.csv")
    assert (data[["kl", "lost_kl", "entropy", "action_gap"]] == 0).all(axis=None)
    assert sum(data["shares"].iloc[-1]) == 0
    plot_diagnostics(data)


# The file


def test_training_that_goes_on(tmp_path):
    """From an old checkpoint: what came after it is written anew; a new model begins a new file."""
    path = tmp_path / "log.csv"
    path.touch()
    model = make_model(RandomObsEnv())
    checkpoints = CheckpointCallback(60, str(tmp_path))
    model.learn(90, callback=CallbackList([PolicyUpdateDiagnostics(path), checkpoints]))
    before = path.read_text().splitlines()
    assert len(before) == 1 + 7
    assert model.policy_update_hooks == []  # the training is over
    assert len(pickle.dumps(model)) > 0  # a hook would bring the callback, and what it knows, along

    model = StaQ.load(tmp_path / "rl_model_60_steps", env=RandomObsEnv())
    assert model.policy_update_hooks == []
    assert model.n_policy_updates == 3  # saved before the update of its last step
    with open(path, "a") as file:
        file.write("8,100,0.1")  # killed in the middle of a line
    assert len(read_diagnostics(path)) == 7
    model.learn(40, callback=PolicyUpdateDiagnostics(path), reset_num_timesteps=False)
    after = path.read_text().splitlines()
    assert after[:4] == before[:4]
    assert after[4:] != before[4:]
    assert list(read_diagnostics(path)["policy_update"]) == list(range(1, model.n_policy_updates + 1))

    # Once more on the same model: one line per update still
    n_updates = model.n_policy_updates
    model.learn(40, callback=PolicyUpdateDiagnostics(path))
    assert list(read_diagnostics(path)["policy_update"]) == list(range(1, n_updates + 3))
    make_model(RandomObsEnv()).learn(40, callback=PolicyUpdateDiagnostics(path))
    assert len(read_diagnostics(path)) == 2


LONG_TRAINING = """
import sys
sys.path.insert(0, sys.argv[2])
from helpers import RandomObsEnv, make_model
from sb3_staq.callbacks import PolicyUpdateDiagnostics
make_model(RandomObsEnv()).learn(10**9, callback=PolicyUpdateDiagnostics(sys.argv[1]))
"""


def test_file_of_a_killed_training(tmp_path):
    """What was measured before ``kill -9`` is there."""
    path = tmp_path / "log.csv"
    process = subprocess.Popen([sys.executable, "-c", LONG_TRAINING, str(path), os.path.dirname(__file__)])
    try:
        deadline = time.monotonic() + 200
        while not (path.exists() and path.read_text().count("\n") >= 6):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    data = read_diagnostics(path)
    assert len(data) >= 5
    assert list(data["policy_update"]) == list(range(1, len(data) + 1))
    np.testing.assert_allclose([shares.sum() for shares in data["shares"]], 1.0, rtol=1e-4)


@pytest.mark.parametrize("n_states", [0, -1, 2.5, None, "256"])
def test_number_of_states_out_of_range(n_states):
    with pytest.raises(ValueError, match=rf"Invalid n_states={n_states!r}: expected an integer >= 1"):
        PolicyUpdateDiagnostics("log.csv", n_states=n_states)


def test_other_files_and_algorithms_are_refused(tmp_path):
    (tmp_path / "precious.csv").write_text("my,thesis\n1,2\n")
    with pytest.raises(
        ValueError, match=r"Invalid path=.*precious.csv'.*expected a file of PolicyUpdateDiagnostics.*my,thesis"
    ):
        make_model().learn(10, callback=PolicyUpdateDiagnostics(tmp_path / "precious.csv"))
    assert (tmp_path / "precious.csv").read_text() == "my,thesis\n1,2\n"
    with pytest.raises(ValueError, match=r"Invalid model=.*DQN.*expected a StaQ model"):
        DQN("MlpPolicy", "CartPole-v1", device="cpu").learn(10, callback=PolicyUpdateDiagnostics(tmp_path / "log.csv"))
