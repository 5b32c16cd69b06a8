"""The stack of frozen critics: its two weightings, its growth, and whatever copies, moves, saves or interrupts it."""

import copy
import gc
import io
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch as th
from architectures import ARCHITECTURES, BOX, NormExtractor, make_policy, push
from helpers import (
    RandomObsEnv,
    by_age,
    grow,
    make_model,
    members,
    randomise,
    relative_error,
    sample_obs,
    slow_average,
    slow_logit_sums,
    slow_q_values,
)
from torch._subclasses import FakeTensor

from sb3_staq import MlpPolicy, StaQ, kernels, observations, q_stack
from sb3_staq.mirror_descent import averaged_updates
from sb3_staq.stack_numbers import NAMES

DATA = Path(__file__).parent / "data"


@pytest.fixture(params=["AMD", "another maker"])
def processor(request, monkeypatch):
    """As on a processor of this maker, which decides how products are computed, with sizes for small networks."""
    monkeypatch.setattr(kernels, "_on_amd", lambda: request.param == "AMD")
    monkeypatch.setattr(kernels, "READ_AHEAD_BYTES", 2 * 32 * 32 * 4)  # two networks


def window_by_definition(n_updates, window, size):
    """All updates of the window, every second, every fourth, ...: the first of these that are few enough."""
    covered = max(1, round(window * n_updates))
    stride = 1
    while True:
        updates = [k for k in range(n_updates - covered + 1, n_updates + 1) if k % stride == 0]
        if covered <= stride * size:
            return updates
        stride *= 2


def both_sums(policy, obs):
    """Under both weightings."""
    return th.stack([policy.logit_sums(obs, weighting) for weighting in ("last", "average")])


def slow_sums(policy, obs):
    """The same, one ordinary network after the other."""
    total = policy.frozen_critics.weights.total
    return th.stack([slow_logit_sums(policy, obs), total * slow_average(policy, obs)])


def assert_sums(policy, obs, bound=2e-6):
    """Both weightings, relative to what is added up."""
    actual, expected = both_sums(policy, obs), slow_sums(policy, obs)
    assert actual.shape == expected.shape and actual.dtype == th.float32
    entries = [slow_q_values(entry, policy.preprocess(obs)).abs().max() for entry in policy.frozen_critics]
    weights = policy.frozen_critics.weights.values
    assert (actual - expected).abs().max() <= bound * sum(map(abs, weights)) * max(entries)


def loop_sum(policy, stack, obs):
    """``sum_i w_i mean_j Q_ij`` over ordinary networks."""
    with th.no_grad():
        values = [th.stack([net(obs) for net in nets]).mean(0) for nets in stack]
    return sum(weight * value for weight, value in zip(policy.frozen_critics.weights.values, values, strict=True))


# Which policy updates are averaged


@pytest.mark.parametrize("window", [0.01, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 60])
def test_averaged_updates(window, size):
    """Evenly thinned over the window, within the bounds of their number, and never what was dropped before."""
    held = set()
    for n in range(1, 800):
        chosen = list(averaged_updates(n, window, size))
        assert chosen == window_by_definition(n, window, size)
        covered = max(1, round(window * n))
        assert all(n - covered < update <= n for update in chosen)
        assert len(chosen) <= size
        if size >= 2:
            assert len(chosen) >= min(covered, size // 2)
        strides = {b - a for a, b in itertools.pairwise(chosen)}
        assert len(strides) <= 1
        assert held.union([n]).issuperset(chosen)
        held = set(chosen)


# The two weightings


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stack_equals_networks_one_by_one(architecture, processor):
    """With a stack that has been full for a while, at several batch sizes; here nothing of the package is summed up."""
    policy = make_policy(architecture, average_window=0.9, average_size=4)
    pushed = []
    for i in range(7):
        pushed.append(push(policy, seed=i, kl_coef=1.0 + i, ent_coef=0.1 + 0.2 * (i % 3)))
    assert policy.frozen_critics.weights.values[-1] == 1.0
    for batch_size in (1, 2, 33):
        obs = sample_obs(policy.observation_space, batch_size)
        sums, average = both_sums(policy, obs)
        assert sums.shape == (batch_size, policy.branches.n_bins)
        assert sums.dtype == average.dtype == th.float32
        expected = loop_sum(policy, pushed[-4:], policy.preprocess(obs))
        assert expected.std() > 0.01
        assert relative_error(sums, expected) < 1e-5
        with th.no_grad():  # the window covers 6 of the 7, every second one is kept
            values = [th.stack([net(policy.preprocess(obs)) for net in pushed[k - 1]]).mean(0) for k in (2, 4, 6)]
        expected = policy.frozen_critics.weights.total * th.stack(values).mean(0)
        assert relative_error(average, expected) < 1e-5
        scale = policy.frozen_critics.weights.scale
        for eval_policy, value in (("last", sums), ("average", average)):
            policy.eval_policy = eval_policy
            th.testing.assert_close(policy.logits(obs), scale * value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch_size", [1, 8, 256, 5000])
@pytest.mark.parametrize("memory_size", [1, 2, 60])
def test_stack_of_any_size_at_any_batch_size(memory_size, batch_size, processor):
    """Whatever way of evaluation is chosen for these sizes: the same sums, to float precision."""
    policy = make_policy("mlp", memory_size=memory_size, net_arch=[32, 32], average_window=1.0, average_size=30)
    for i in range(memory_size + 7):
        push(policy, seed=i, kl_coef=20.0, ent_coef=0.4)
    obs = sample_obs(policy.observation_space, batch_size)
    assert relative_error(policy.logit_sums(obs), slow_logit_sums(policy, obs)) < 2e-6
    assert_sums(policy, obs)


@pytest.mark.parametrize(
    ("architecture", "memory_size", "window", "size"),
    [
        ("mlp", 3, 0.15, 4),  # the stride doubles at 30, 60, 120 and 240 updates
        ("one_critic", 50, 0.15, 8),  # the memory is longer than the window at first
        ("branches", 7, 1.0, 6),  # from the first update on
        ("linear", 300, 0.3, 60),  # never full
        ("main_effects", 1, 0.5, 10),
        ("three_critics", 40, 0.02, 2),  # always longer than the window
    ],
)
def test_hundreds_of_pushes(architecture, memory_size, window, size):
    """Entries are what the rule or the average needs, and no other; sums are right throughout."""
    policy = make_policy(architecture, memory_size=memory_size, average_window=window, average_size=size)
    stack = policy.frozen_critics
    obs = sample_obs(policy.observation_space, 5)
    pushed = {}
    strides = set()
    for k in range(1, 281):
        push(policy, seed=k, kl_coef=1.0 + k % 3, ent_coef=0.1)
        pushed[k] = policy.q_values(policy.additive_critics, obs)
        recent = set(range(max(1, k - memory_size + 1), k + 1))
        averaged = window_by_definition(k, window, size)
        assert sorted(stack.updates) == sorted(recent.union(averaged))
        assert set(stack.updates[: len(recent)]) == recent
        assert len(stack) == len(stack.updates) <= memory_size + size
        assert len(stack.weights) == len(recent)
        strides.add(averaged[1] - averaged[0] if len(averaged) > 1 else 0)
        if k in (1, 2, 5, 17, 60, 121, 280):
            assert_sums(policy, obs)
        if k in (60, 280):
            for entry, update in zip(stack, stack.updates, strict=True):
                th.testing.assert_close(policy.q_values(entry, obs), pushed[update], rtol=1e-5, atol=1e-6)
            newest = policy.q_values(stack.newest, obs)
            th.testing.assert_close(newest, pushed[k], rtol=1e-5, atol=1e-6)
    if window >= 0.15 and memory_size < 50:
        assert len(strides) >= 3


@pytest.mark.parametrize("rule", ["weight_corrected", "truncated", "exact"])
def test_memory_that_changes(rule):
    """A stack that grows, is full, shrinks by several at once and grows again."""
    policy = make_policy("mlp", memory_size=6, logit_rule=rule, average_window=0.5, average_size=4)
    stack, obs = policy.frozen_critics, sample_obs(BOX, 6)
    sums = th.zeros(6, 3, dtype=th.float64)
    n_recent = 0
    for k, memory_size in enumerate([6] * 9 + [2] * 5 + [1] * 4 + [9] * 12 + [3] * 6, 1):
        randomise(policy.critics, seed=k)
        q_new = slow_q_values(policy.critics, obs)
        update, deleted = policy.push_critics(1.0 + k % 3, 0.1, memory_size)
        n_deleted = 0 if rule == "exact" else max(0, n_recent + 1 - memory_size)
        n_recent += 1 - n_deleted
        assert len(deleted) == len(update.deleted_weights) == n_deleted
        assert len(stack.weights) == n_recent
        recent = set(range(k - n_recent + 1, k + 1))
        needed = recent.union(window_by_definition(k, 0.5, 4))
        assert recent <= set(stack.updates) <= needed
        if memory_size < 9:  # with a longer memory, the next windows need what the shorter one kept
            assert len(stack) <= n_recent + 4
        if k % 3 == 0:
            assert_sums(policy, obs)
        sums = update.apply(sums, q_new, [slow_q_values(entry, obs) for entry in deleted])
        assert relative_error(policy.logit_sums(obs), sums) < 1e-5


@pytest.mark.parametrize("memory_size", [1, 2, 5])
def test_growth_and_deletion_order(memory_size):
    """Entries are the critics at the time of their push; a full stack loses its oldest entry."""
    policy = make_policy("mlp", memory_size=memory_size, average_size=0)
    obs = sample_obs(BOX, 6)
    pushed, seen = [], []
    for i in range(3 * memory_size + 1):
        randomise(policy.critics, seed=i)
        pushed.append(policy.q_values(policy.critics, obs))
        update, deleted = policy.push_critics(1.0, 0.1)
        assert len(policy.frozen_critics) == min(i + 1, memory_size)
        if i < memory_size:
            assert deleted == []
            assert update.deleted_weights == ()
        else:
            assert len(deleted) == len(update.deleted_weights) == 1
            th.testing.assert_close(policy.q_values(deleted[0], obs), pushed[i - memory_size], rtol=0, atol=0)
            seen += deleted
        randomise(policy.critics, seed=1000 + i)  # the online critics train on
        values = [policy.q_values(entry, obs) for entry in by_age(policy)]
        for value, expected in zip(values, pushed[-memory_size:], strict=True):
            th.testing.assert_close(value, expected, rtol=0, atol=0)
        th.testing.assert_close(policy.q_values(policy.frozen_critics.newest, obs), pushed[i], rtol=0, atol=0)
    for deleted, expected in zip(seen, pushed, strict=False):  # deleted entries stay what they were
        th.testing.assert_close(policy.q_values(deleted, obs), expected, rtol=0, atol=0)


def test_exact_rule_keeps_everything():
    policy = make_policy("mlp", memory_size=2, logit_rule="exact")
    stack = [push(policy, seed=i, kl_coef=5.0, ent_coef=0.3) for i in range(11)]
    assert len(policy.frozen_critics) == 11
    obs = sample_obs(BOX, 6)
    assert relative_error(policy.logit_sums(obs), loop_sum(policy, stack, obs)) < 1e-5
    assert_sums(policy, obs)


@pytest.mark.parametrize(
    "by_age", [[1.0, -2.0, 0.5], [-1.0, -0.1, -1e-3], [0.0, 0.0, 3.0], [1.0, -1.0, 0.0], [1.0, 1e-3, 1e6]], ids=str
)
@pytest.mark.parametrize("architecture", ["mlp", "branches"])
def test_custom_weights(architecture, by_age):
    """The logits are ``sum_age w(age) Q_{k-age}``, missing critics count as zero; the average has the same sum."""
    policy = make_policy(architecture, memory_size=3, logit_rule=by_age)
    obs = sample_obs(BOX, 6)
    pushed: list[th.Tensor] = []
    for i in range(8):
        randomise(policy.critics, seed=i)
        pushed.insert(0, slow_q_values(policy.critics, obs))
        policy.push_critics(1.0 + i, 0.1)
        expected = sum(weight * q_values for weight, q_values in zip(by_age, pushed, strict=False))
        bound = 1e-5 * max(map(abs, by_age))
        th.testing.assert_close(policy.logits(obs).double(), expected, rtol=1e-5, atol=bound)
        expected = sum(by_age[: i + 1]) * pushed[0]  # the window covers one critic
        actual = policy.logit_sums(obs, "average").double()
        th.testing.assert_close(actual, expected, rtol=1e-5, atol=bound)


@pytest.mark.parametrize("average_size", [4, 60])
def test_candidate_and_best_stay_on_the_stack(average_size, tmp_path):
    """With their temperatures; those that are replaced make room at the next push. Until there are any: the average."""
    policy = make_policy("branches", memory_size=3, average_window=0.4, average_size=average_size, eval_policy="best")
    stack, obs = policy.frozen_critics, sample_obs(BOX, 6)
    expected, taken = {}, {}

    def average():
        return stack.weights.scale * stack.weights.total * slow_average(policy, obs)

    for i in range(90):
        push(policy, seed=i, kl_coef=1.0 + i, ent_coef=1.0 / (1 + i))
        needed = {x for n in (i + 1, *taken.values()) for x in window_by_definition(n, 0.4, average_size)}
        assert set(stack.updates) == needed | set(range(max(1, i - 1), i + 2))
        assert len(stack) <= 3 + 3 * average_size
        if i in (20, 25, 40, 70):
            accept = i in (25, 70)
            stack.propose(accept)
            if accept:
                expected["best"], taken["best"] = expected["candidate"], taken["candidate"]
            expected["candidate"], taken["candidate"] = average(), i + 1
        for weighting in ("candidate", "best"):
            actual = (stack.weights.scale * policy.logit_sums(obs, weighting)).double()
            wanted = expected.get(weighting, average())
            th.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max())
        th.testing.assert_close(policy.logits(obs), actual.float())
        assert_sums(policy, obs)
    policy.save(tmp_path / "policy")
    for other in (MlpPolicy.load(tmp_path / "policy"), copy.deepcopy(policy)):
        th.testing.assert_close(other.logits(obs), policy.logits(obs))
        push(other, seed=100)
        assert len(other.frozen_critics) > 3 + average_size // 2


def test_a_new_candidate_acts_at_once():
    """Not only after the next push, also if the one before has acted since the last push."""
    policy = make_policy("branches", memory_size=3, average_window=0.4, average_size=4)
    stack, obs = policy.frozen_critics, sample_obs(BOX, 6)
    for i in range(20):
        push(policy, seed=i)
        if i == 9:
            stack.propose(accept=False)
    candidate, best, average = (policy.logit_sums(obs, weighting) for weighting in ("candidate", "best", "average"))
    assert relative_error(candidate, average) > 1e-2
    th.testing.assert_close(best, average)
    stack.propose(accept=True)
    th.testing.assert_close(policy.logit_sums(obs, "candidate"), average)
    th.testing.assert_close(policy.logit_sums(obs, "best"), candidate)


def test_batches_do_not_mix_observations():
    """The value at an observation does not depend on what else is in the batch."""
    policy = make_policy("mlp", memory_size=20, average_window=1.0)
    for i in range(20):
        push(policy, seed=i)
    obs = sample_obs(policy.observation_space, 300)
    one_by_one = th.cat([both_sums(policy, obs[i : i + 1]) for i in range(300)], dim=1)
    assert relative_error(both_sums(policy, obs), one_by_one) < 1e-6


@pytest.mark.parametrize("architecture", ["mlp", "dict", "image"])
def test_parts_of_a_batch(architecture, monkeypatch):
    """Large batches and long stacks are evaluated in parts: the same values, and none for no observation."""
    policy = make_policy(architecture, memory_size=9, average_window=1.0)
    for i in range(9):
        push(policy, seed=i)
    obs = sample_obs(policy.observation_space, 23)
    whole = both_sums(policy, obs)
    n_numbers = sum(x[0].numel() for x in (obs.values() if isinstance(obs, dict) else [obs]))
    monkeypatch.setattr(observations, "OBS_ELEMENTS", 5 * n_numbers)
    monkeypatch.setattr(q_stack, "CHUNK_ELEMENTS", 1)
    assert relative_error(both_sums(policy, obs), whole) < 1e-6
    none = {key: x[:0] for key, x in obs.items()} if isinstance(obs, dict) else obs[:0]
    assert both_sums(policy, none).shape == (2, 0, 3)


def test_empty_stack_is_uniform():
    for eval_policy in ("last", "average"):
        policy = make_policy("dict", eval_policy=eval_policy)
        obs = sample_obs(policy.observation_space, 5)
        assert policy.logits(obs).tolist() == [[0.0] * 3] * 5
        np.testing.assert_allclose(policy.get_distribution(obs).distribution.probs, 1 / 3, rtol=1e-6)


def test_no_gradient_reaches_frozen_critics():
    """Training changes nothing in the stack, and the optimizer does not know of it or of the targets."""
    model = make_model(memory_size=3)
    model.learn(70)
    policy = model.policy
    assert len(policy.frozen_critics) == 3
    trained = {id(param) for group in policy.optimizer.param_groups for param in group["params"]}
    assert trained == {id(param) for param in policy.critics.parameters()}
    frozen = [*policy.frozen_critics.parameters(), *policy.critics_target.parameters()]
    assert not any(param.requires_grad for param in frozen)
    assert not any(entry.training for entry in policy.frozen_critics)

    before = copy.deepcopy(policy.frozen_critics.state_dict())
    online = copy.deepcopy(policy.critics.state_dict())
    model.policy_update_interval = 10**6
    model.train(gradient_steps=20, batch_size=16)
    after = policy.frozen_critics.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert th.equal(value, after[key]), key
    assert not any(th.equal(value, online[key]) for key, value in policy.critics.state_dict().items())
    assert all(param.grad is None for param in frozen)
    assert not policy.logits(th.zeros(2, 4)).requires_grad


# Memory


def assert_entries_are_live(policy):
    """What is written into the parameters of an entry is what the policy evaluates: there is no second copy."""
    obs = sample_obs(policy.observation_space, 6)
    weights = dict(zip(map(id, by_age(policy)), policy.frozen_critics.weights.values, strict=True))
    for entry in policy.frozen_critics:
        before = policy.logit_sums(obs)
        bias = entry.net.q_net[-1].bias
        old = bias.detach().clone()
        with th.no_grad():
            bias += 1.0
        after = policy.logit_sums(obs)
        expected = th.full_like(before, weights.get(id(entry), 0.0))
        th.testing.assert_close(after - before, expected, rtol=1e-3, atol=1e-4)
        with th.no_grad():
            bias.copy_(old)
    storages = {}
    for name, param in policy.frozen_critics.named_parameters():
        layer = name.partition(".")[2]
        storages.setdefault(layer, set()).add(param.untyped_storage().data_ptr())
    assert all(len(pointers) == 1 for pointers in storages.values())


KINDS = ["push", "dtype", "device", "deepcopy", "deepcopy of the stack", "pickle", "state_dict", "state_dict as file"]
AVERAGE = dict(average_window=0.6, average_size=3)


def round_trip(policy, kind):
    if kind == "push":
        push(policy, seed=77)
    elif kind == "dtype":
        policy.to(th.float64)
        assert {param.dtype for param in policy.frozen_critics.parameters()} == {th.float64}
        policy.to(th.float32)
    elif kind == "device":
        policy.to("cpu")
    elif kind == "deepcopy":
        return copy.deepcopy(policy)
    elif kind in ("deepcopy of the stack", "pickle"):
        other = make_policy("mlp", memory_size=5, **AVERAGE)
        stack = policy.frozen_critics
        other.frozen_critics = copy.deepcopy(stack) if kind != "pickle" else pickle.loads(pickle.dumps(stack))
        return other
    elif kind in ("state_dict", "state_dict as file"):
        state = policy.state_dict()
        if kind == "state_dict as file":
            file = io.BytesIO()
            th.save(state, file)
            file.seek(0)
            state = th.load(file, weights_only=True)
        other = make_policy("mlp", memory_size=5, **AVERAGE)
        other.load_state_dict(state)
        return other
    return policy


@pytest.fixture(params=["usual", "large"])
def pages(request, monkeypatch):
    """How the memory of the stack is asked for: stacks of these tests would be too small for large pages."""
    monkeypatch.setattr(kernels, "_special", lambda: request.param == "large")
    monkeypatch.setattr(kernels, "LARGE_PAGE_BYTES", 1)
    if request.param == "large" and not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("this system has no way to ask for large pages")


@pytest.mark.usefixtures("pages")
@pytest.mark.parametrize("n_entries", [1, 3, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trips(kind, n_entries):
    """
    What moves or copies a module leaves the logits of both weightings as they are, to the last bit.

    Blocks and entries go on sharing their memory, and the stack grows on as the original does.
    """
    policy = make_policy("mlp", memory_size=5, **AVERAGE)
    for i in range(n_entries):
        push(policy, seed=i)
    obs = sample_obs(BOX, 6)
    before = both_sums(policy, obs)
    original = policy
    policy = round_trip(policy, kind)
    stack = policy.frozen_critics
    if kind != "push":
        assert th.equal(both_sums(policy, obs), before)
        assert stack.weights.values == original.frozen_critics.weights.values
        assert stack.weights.scale == original.frozen_critics.weights.scale
        assert stack.weights.ent_coef == original.frozen_critics.weights.ent_coef
        assert (list(stack.updates), stack.n_updates) == (list(original.frozen_critics.updates), n_entries)
    assert not any(param.requires_grad for param in stack.parameters())
    assert_entries_are_live(policy)
    expected = both_sums(original, obs)
    twin = copy.deepcopy(original)
    for i in range(7):
        push(policy, seed=100 + i)
        if i in (0, 6):
            assert_entries_are_live(policy)
            assert_sums(policy, obs)
        if policy is not original:
            push(twin, seed=100 + i)
            assert th.equal(both_sums(policy, obs), both_sums(twin, obs))
    if policy is not original:  # a copy is independent of its original
        assert th.equal(both_sums(original, obs), expected)


def live_tensor_bytes():
    """Bytes of all distinct storages of all tensors that are alive; PyTorch's compiler keeps some without memory."""
    gc.collect()
    storages = {}
    for obj in gc.get_objects():
        if issubclass(type(obj), th.Tensor) and type(obj) is not FakeTensor:
            storage = obj.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("memory_size", [33, 100])
def test_memory_of_a_full_stack(memory_size):
    """A full stack takes at most 5% more than its critics' parameters: no copies, no spare capacity."""
    before = live_tensor_bytes()
    policy = make_policy("mlp", memory_size=memory_size, net_arch=[64, 64], average_size=0)
    empty = live_tensor_bytes() - before
    for i in range(memory_size + 20):
        push(policy, seed=i)
        policy.logit_sums(th.zeros(1, 4))
    one_entry = sum(param.nbytes for param in policy.critics.parameters())
    assert live_tensor_bytes() - before - empty <= 1.05 * memory_size * one_entry


def test_memory_of_a_full_stack_with_an_average():
    """At most room for ``memory_size + average_size`` critics, however many there are pushed."""
    before = live_tensor_bytes()
    policy = make_policy("mlp", memory_size=10, net_arch=[64, 64], average_window=1.0, average_size=20)
    empty = live_tensor_bytes() - before
    for i in range(150):
        push(policy, seed=i)
    one_entry = sum(param.nbytes for param in policy.critics.parameters())
    assert live_tensor_bytes() - before - empty <= 1.05 * 30 * one_entry


def test_memory_while_growing_is_at_most_doubled():
    policy = make_policy("mlp", memory_size=200, net_arch=[64, 64])
    one_entry = sum(param.nbytes for param in policy.critics.parameters())
    before = live_tensor_bytes()
    for n in range(1, 71):
        push(policy, seed=n)
        if n % 23 == 0:
            assert live_tensor_bytes() - before <= 2.05 * n * one_entry


# Weights that do not matter


@pytest.mark.parametrize("coefs", [(1.0, 9.0), (1.0, 1.0), (20.0, 0.4)])
@pytest.mark.parametrize("batch_size", [3, 20_000])
def test_skipping_negligible_weights(batch_size, coefs):
    """Skipping changes the weighted average of the Q-values by less than float resolution, however old they are."""
    policy = make_policy("mlp", memory_size=40)
    for i in range(45):
        push(policy, i, *coefs)
    obs = sample_obs(BOX, 50)
    values = th.stack([slow_q_values(entry, obs) for entry in by_age(policy)])
    weights = th.tensor(policy.frozen_critics.weights.values, dtype=th.float64)
    # The stated bound: less than 2^-32 of the sum of the weights times max|Q| for each skipped critic, and rounding
    bound = (40 * 2.0**-32 + 1e-6) * weights.sum() * values.abs().max()
    sums = policy.logit_sums(obs.repeat(-(-batch_size // 50), 1)[:batch_size])
    error = (sums[:50] - th.tensordot(weights, values, dims=1)[:batch_size]).abs().max()
    assert error <= bound


def test_old_critics_with_huge_values_are_within_the_bound():
    """An old critic whose values are a million times larger does count where its weight says so."""
    policy = make_policy("mlp", memory_size=10)
    randomise(policy.critics, seed=0)
    with th.no_grad():
        for param in policy.critics.net.q_net[-1].parameters():
            param *= 1e6
    policy.push_critics(1.0, 9.0)
    for i in range(5):  # the weight of the first is 1e-5 now
        push(policy, seed=i, kl_coef=1.0, ent_coef=9.0)
    obs = sample_obs(BOX, 50)
    expected = slow_logit_sums(policy, obs)
    without_first = sum(
        weight * slow_q_values(entry, obs)
        for weight, entry in list(zip(policy.frozen_critics.weights.values, by_age(policy), strict=True))[1:]
    )
    assert relative_error(without_first, expected) > 0.1
    assert relative_error(policy.logit_sums(obs), expected) < 1e-6


# Saving and loading


@pytest.mark.parametrize("architecture", ["mlp", "main_effects", "branches_layer_norm"])
@pytest.mark.parametrize("n", [0, 1, 9])
def test_state_dict_holds_floats_only(architecture, n):
    """Tensors of single precision, as other tools for weights expect."""
    policy = make_policy(architecture)
    for i in range(n):
        push(policy, seed=i)
    state = policy.state_dict()
    assert {key for key in state if key.startswith("frozen_critics.") and "net" not in key} == {
        f"frozen_critics.{name}" for name in NAMES
    }
    for key, value in state.items():
        assert isinstance(value, th.Tensor) and value.dtype == th.float32, key
        assert not value.requires_grad and value.is_contiguous(), key


@pytest.mark.parametrize("n", [0, 1, 9])
@pytest.mark.parametrize("seed", range(3))
def test_random_numbers_in_the_place_of_all_tensors(n, seed):
    """As tools that perturb or reset all tensors give them: they load, predict, and the stack grows on."""
    policy = make_policy("mlp", eval_policy="average")
    for i in range(n):
        push(policy, seed=i)
    th.manual_seed(seed)
    policy.load_state_dict({key: th.rand_like(value) for key, value in policy.state_dict().items()})
    obs = sample_obs(BOX, 6)
    for i in range(12):
        assert th.isfinite(both_sums(policy, obs)).all()
        assert np.isin(policy.predict(obs.numpy())[0], [0, 1, 2]).all()
        push(policy, seed=i)
    assert relative_error(policy.logit_sums(obs), slow_logit_sums(policy, obs)) < 1e-5


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_arithmetic_on_state_dicts(factor):
    """Of two models of the same age can be averaged; weights that are halved halve the sums."""
    policy = make_policy("mlp")
    for i in range(6):
        push(policy, seed=i)
    obs = sample_obs(BOX, 6)
    before = both_sums(policy, obs)
    state = policy.state_dict()
    mean = {key: (value + value) / 2 for key, value in state.items()}
    policy.load_state_dict(mean)
    assert th.equal(both_sums(policy, obs), before)
    state["frozen_critics.weights"] = state["frozen_critics.weights"] * factor
    policy.load_state_dict(state)
    th.testing.assert_close(both_sums(policy, obs), before * factor)


def replaced(tensor, index, value):
    """A copy with one number replaced."""
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


NAN, INF = float("nan"), float("inf")
DAMAGES = {
    "NaN weight": ("weights", lambda x: replaced(x, (1, 0), NAN)),
    "infinite weight": ("weights", lambda x: replaced(x, (0, 1), INF)),
    "more weights than critics": ("weights", lambda x: x.repeat(3, 1)),
    "weights without their parts": ("weights", lambda x: x[:, :2]),
    "weights as a list": ("weights", lambda x: x.flatten()),
    "NaN update": ("updates", lambda x: replaced(x, 2, NAN)),
    "updates as a table": ("updates", lambda x: x.unsqueeze(1)),
    "updates as a number": ("updates", lambda x: x[0]),
    "infinite scale": ("constants", lambda x: replaced(x, (0, 0), INF)),
    "NaN scale": ("constants", lambda x: replaced(x, (0, 2), NAN)),
    "infinite entropy coefficient": ("constants", lambda x: replaced(x, (1, 0), INF)),
    "NaN number of updates": ("constants", lambda x: replaced(x, (2, 0), NAN)),
    "too few constants": ("constants", lambda x: x[:2]),
    "NaN time of an average": ("marked", lambda x: replaced(x, (2, 0), NAN)),
    "too few averages": ("marked", lambda x: x[:2]),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_numbers_are_refused(what):
    """The error says so, and the policy stays as it was."""
    policy, other = make_policy("mlp"), make_policy("mlp")
    for i in range(7):
        push(policy, seed=i)
        push(other, seed=50 + i)
    obs = sample_obs(BOX, 6)
    before, online = both_sums(other, obs), other.critics(obs)
    name, damage = DAMAGES[what]
    state = policy.state_dict()
    state[f"frozen_critics.{name}"] = damage(state[f"frozen_critics.{name}"])
    with pytest.raises(ValueError, match="saved stack is damaged"):
        other.load_state_dict(state)
    assert th.equal(both_sums(other, obs), before)
    assert th.equal(other.critics(obs), online)
    push(other, seed=99)
    assert_sums(other, obs)


@pytest.mark.parametrize(
    "names",
    [["weights", "updates", "constants", "marked"], ["weights"], ["updates"], ["constants"], ["marked"]],
    ids=str,
)
def test_missing_numbers_are_refused(names):
    """By the error of PyTorch that names what is missing."""
    policy, other = make_policy("mlp"), make_policy("mlp")
    for i in range(3):
        push(policy, seed=i)
        push(other, seed=50 + i)
    state = policy.state_dict()
    for name in names:
        del state[f"frozen_critics.{name}"]
    with pytest.raises(RuntimeError, match=rf"Missing key.*frozen_critics\.{names[0]}"):
        other.load_state_dict(state)


@pytest.mark.parametrize("n_entries", [0, 1, 5, 12])
@pytest.mark.parametrize("n_before", [0, 2, 7])
def test_a_stack_of_any_size_loads(n_before, n_entries):
    """Whatever the stack held before; and it goes on as the original does."""
    policy = make_policy("mlp", memory_size=5, **AVERAGE)
    for i in range(n_entries):
        push(policy, seed=i, kl_coef=1.0 + i)
    other = make_policy("mlp", memory_size=5, **AVERAGE)
    for i in range(n_before):
        push(other, seed=50 + i)
    version = other.frozen_critics.version
    other.load_state_dict(policy.state_dict())
    assert other.frozen_critics.version != version
    obs = sample_obs(BOX, 6)
    assert len(other.frozen_critics) == len(policy.frozen_critics)
    for i in range(8):
        assert th.equal(both_sums(other, obs), both_sums(policy, obs))
        push(policy, seed=100 + i)
        push(other, seed=100 + i)


def test_larger_and_smaller_memories_load_a_stack():
    """The policy is the saved one; the next push deletes what is too much."""
    policy = make_policy("mlp", memory_size=5, **AVERAGE)
    for i in range(8):
        push(policy, seed=i)
    obs = sample_obs(BOX, 6)
    expected = both_sums(policy, obs)
    for kwargs in (dict(memory_size=9), dict(memory_size=3), dict(memory_size=3, logit_rule="exact")):
        other = make_policy("mlp", **kwargs, **AVERAGE)
        other.load_state_dict(policy.state_dict())
        assert th.equal(both_sums(other, obs), expected)
        update, deleted = other.push_critics(1.0, 0.1)
        assert len(deleted) == len(update.deleted_weights) == (3 if kwargs == dict(memory_size=3) else 0)
        assert_sums(other, obs)


def test_model_takes_a_larger_stack():
    """By set_parameters(), and goes on learning with its own memory."""
    model, other = make_model(memory_size=4), make_model(memory_size=2, seed=1)
    grow(model, 4)
    grow(other, 2, seed=9)
    obs = sample_obs(other.observation_space, 6).clamp(-3, 3)
    other.set_parameters(model.get_parameters())
    assert th.equal(both_sums(other.policy, obs), both_sums(model.policy, obs))
    other.learn(60)
    assert len(other.policy.frozen_critics.weights) == 2
    assert_sums(other.policy, obs)


def test_wrong_architecture_is_refused():
    policy, other = make_policy("mlp"), make_policy("tanh")
    push(policy, seed=0)
    with pytest.raises(RuntimeError, match=r"size mismatch|Unexpected key"):
        other.load_state_dict(policy.state_dict())


@pytest.mark.parametrize("n_pushed", [1, 5, 9])
def test_saved_stack_has_no_unused_rows(n_pushed):
    """While the blocks grow they have room for more entries, which is not saved."""
    policy = make_policy(memory_size=50)
    for _ in range(n_pushed):
        policy.push_critics(0.5, 0.05)
    state = policy.frozen_critics.state_dict()
    size = sum(value.untyped_storage().nbytes() for value in state.values())
    critics = sum(param.numel() * param.element_size() for param in policy.critics.parameters())
    numbers = 4 * (3 * n_pushed + n_pushed + 9 + 12)
    assert size == n_pushed * critics + numbers


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="NumPy 1 cannot read pickles of NumPy 2")
@pytest.mark.parametrize("name", ["cartpole", "pendulum"])
def test_files_of_version_0_1_0(name):
    """Models, policies and their dictionaries give the logits that they gave then, and learn on."""
    expected = np.load(DATA / f"{name}_0.1.0_expected.npz")
    obs, n = th.as_tensor(expected["obs"]), int(expected["n_frozen"])
    policy = MlpPolicy.load(DATA / f"{name}_0.1.0.pth")
    model = StaQ.load(DATA / f"{name}_0.1.0.zip", device="cpu")
    state = th.load(DATA / f"{name}_0.1.0.pth", weights_only=False)["state_dict"]
    again = MlpPolicy.load(DATA / f"{name}_0.1.0.pth")
    push(again, seed=0)
    again.load_state_dict(state)
    assert "frozen_critics._extra_state" in state  # as it was given
    for loaded in (policy, model.policy, again):
        assert len(loaded.frozen_critics) == n
        loaded.eval_policy = "last"
        np.testing.assert_allclose(loaded.logits(obs).numpy(), expected["logits"], rtol=0, atol=1e-6)
        saved = io.BytesIO()
        loaded.save(saved)
        saved.seek(0)
        assert th.equal(both_sums(MlpPolicy.load(saved), obs), both_sums(loaded, obs))
        for i in range(5):
            push(loaded, seed=i)
            assert_sums(loaded, obs)


# What interrupts a policy update


class Interruptions:
    """
    Interrupt the n-th of what may be interrupted while a stack is pushed on.

    :param monkeypatch: puts all back afterwards
    :param interrupt: what happens then
    :param what: "memory": where memory is asked for; "copies": where it is written; "lines": before any line of the
        stack's code
    """

    def __init__(self, monkeypatch, interrupt, what):
        self.interrupt, self.what = interrupt, what
        self.n, self.at, self.active = 0, -1, False
        owners = {"memory": [(th.Tensor, "clone"), (th.Tensor, "new_empty"), (copy, "deepcopy"), (q_stack, "allocate")]}
        owners["copies"] = [(th.Tensor, "copy_"), *owners["memory"]]
        for owner, name in owners.get(what, []):
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _count(self):
        self.n += 1
        if self.n == self.at:
            self.interrupt()

    def _wrapped(self, function):
        def wrapper(*args, **kwargs):
            if self.active:
                self._count()
            return function(*args, **kwargs)

        return wrapper

    def _trace(self, frame, event, arg):
        if frame.f_code.co_filename != q_stack.__file__:
            return None
        if event == "line":
            self._count()
        return self._trace

    def run(self, function, at=-1):
        """Call a function that is interrupted at the n-th place; give the number of places."""
        self.n, self.at, self.active = 0, at, True
        tracer = sys.gettrace()
        if self.what == "lines":
            sys.settrace(self._trace)
        try:
            function()
        finally:
            sys.settrace(tracer)
            self.active = False
        return self.n


def out_of_memory():
    raise MemoryError


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("interrupt", "what", "error"),
    [
        (ctrl_c, "copies", KeyboardInterrupt),
        (ctrl_c, "lines", KeyboardInterrupt),
        (out_of_memory, "memory", MemoryError),
    ],
    ids=["Ctrl-C in copies", "Ctrl-C in any line", "out of memory"],
)
@pytest.mark.parametrize("n_pushed", [1, 4, pytest.param(12, marks=pytest.mark.slow)])
def test_interrupted_push(n_pushed, interrupt, what, error, monkeypatch, request):
    """Wherever it happens, the policy is that before or after the push, can be saved and loaded, and goes on."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    original = make_policy("mlp", net_arch=[4], memory_size=3, **AVERAGE)
    for i in range(n_pushed):
        push(original, seed=i)
    randomise(original.critics, seed=99)
    obs = sample_obs(BOX, 6)
    before = both_sums(original, obs)
    interruptions = Interruptions(monkeypatch, interrupt, what)
    done = copy.deepcopy(original)
    n_places = interruptions.run(lambda: done.push_critics(1.0, 0.1))
    assert n_places > 0
    after = both_sums(done, obs)
    assert not th.allclose(before, after)
    seen = set()
    handler = signal.getsignal(signal.SIGINT)
    for at in range(1, n_places + 1):
        policy = copy.deepcopy(original)
        with pytest.raises(error):
            interruptions.run(lambda policy=policy: policy.push_critics(1.0, 0.1), at)
        assert signal.getsignal(signal.SIGINT) is handler
        now = both_sums(policy, obs)
        is_after = th.equal(now, after)
        assert is_after or th.equal(now, before)
        seen.add(is_after)
        other = make_policy("mlp", net_arch=[4], memory_size=3, **AVERAGE)
        other.load_state_dict(policy.state_dict())
        assert th.equal(both_sums(other, obs), now)
        if not is_after:
            policy.push_critics(1.0, 0.1)
        assert th.equal(both_sums(policy, obs), after)
        push(policy, seed=100)
        assert_sums(policy, obs)
    assert False in seen
    assert (True in seen) == (error is KeyboardInterrupt)


def test_critics_of_another_architecture_are_refused():
    """Before anything changes."""
    policy = make_policy("mlp")
    for i in range(5):
        push(policy, seed=i)
    obs = sample_obs(BOX, 6)
    before = both_sums(policy, obs)
    for other in (make_policy("tanh"), make_policy("one_critic"), make_policy("mlp", net_arch=[1, 8])):
        with pytest.raises(ValueError, match="Invalid critics: expected the architecture of the stack"):
            policy.frozen_critics.push(other.critics, 1.0, 0.1)
        assert th.equal(both_sums(policy, obs), before)
        assert len(policy.frozen_critics.updates) == len(policy.frozen_critics) == 4


def test_push_in_a_thread():
    """Where no signal can be handled: the same as in the main thread."""
    policies = [make_policy("mlp", **AVERAGE) for _ in range(2)]
    obs = sample_obs(BOX, 6)
    for i in range(9):
        push(policies[0], seed=i)
    errors = []

    def work():
        try:
            for i in range(9):
                push(policies[1], seed=i)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert th.equal(both_sums(policies[1], obs), both_sums(policies[0], obs))


class PausingExtractor(NormExtractor):
    """Pauses in the middle of a prediction, except in the main thread."""

    pauses: threading.Event
    goes_on: threading.Event

    def forward(self, obs):
        if threading.current_thread() is not threading.main_thread():
            self.pauses.set()
            self.goes_on.wait(0.5)
        return super().forward(obs)


def pausing_policy():
    """A policy whose networks pause, observations, and its logits there."""
    PausingExtractor.pauses, PausingExtractor.goes_on = threading.Event(), threading.Event()
    policy = make_policy("extractor", features_extractor_class=PausingExtractor)
    obs = sample_obs(BOX, 6)
    for i in range(3):
        push(policy, seed=i)
    return policy, obs, policy.logits(obs)


@pytest.mark.parametrize("what", ["push", "predict"])
def test_prediction_in_another_thread(what):
    """Neither of two threads that use the networks at the same time gets those of the other."""
    PausingExtractor.pauses, PausingExtractor.goes_on = threading.Event(), threading.Event()
    policy, expected = make_policy("extractor", features_extractor_class=PausingExtractor), make_policy("extractor")
    expected.load_state_dict(policy.state_dict())
    obs = sample_obs(BOX, 6)
    for i in range(3):
        push(policy, seed=i)
        push(expected, seed=i)
    with ThreadPoolExecutor(1) as other:
        result = other.submit(policy.logits, obs)
        PausingExtractor.pauses.wait()
        for stack in (policy, expected):
            push(stack, seed=3) if what == "push" else stack.predict(obs.numpy())
        PausingExtractor.goes_on.set()
        assert result.result().shape == (6, 3)
    for stack in (policy, expected):
        push(stack, seed=4)
    th.testing.assert_close(policy.logits(obs), expected.logits(obs))


def by_state_dict(policy):
    copied = make_policy("extractor", features_extractor_class=PausingExtractor)
    copied.load_state_dict(policy.state_dict())
    return copied


@pytest.mark.parametrize("take", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy)), by_state_dict])
def test_copies_while_another_thread_uses_the_networks(take):
    """They have the parameters of the policy, whatever is in their place at the moment."""
    policy, obs, before = pausing_policy()
    for use in (policy.logits, policy.critics):  # of the stack, and of the critics that are trained
        PausingExtractor.pauses.clear()
        with ThreadPoolExecutor(1) as other:
            result = other.submit(use, obs)
            PausingExtractor.pauses.wait()
            copied = take(policy)
            PausingExtractor.goes_on.set()
            result.result()
        PausingExtractor.goes_on.clear()
        assert th.equal(copied.logits(obs), before)
        values = (copied.critics.eval()(obs), policy.critics.eval()(obs))
        policy.critics.train()
        assert th.equal(*values)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_fork_while_another_thread_uses_the_networks():
    """The child can use them, too."""
    policy, obs, before = pausing_policy()
    with ThreadPoolExecutor(1) as other:
        result = other.submit(policy.logits, obs)
        PausingExtractor.pauses.wait()
        act = lambda: sys.exit(0 if th.equal(policy.logits(obs), before) else 1)  # noqa: E731
        child = multiprocessing.get_context("fork").Process(target=act)
        child.start()
        child.join(20)
        PausingExtractor.goes_on.set()
        result.result()
    child.kill()
    assert child.exitcode == 0


def test_push_during_a_prediction(monkeypatch):
    """A thread that has begun with the old weights does not leave them to later predictions."""
    policy = make_policy("mlp")
    obs = sample_obs(BOX, 6)
    for i in range(3):
        push(policy, seed=i)
    rule_values = q_stack.FrozenCritics._rule_values

    def push_meanwhile(stack):
        values = rule_values(stack)
        monkeypatch.undo()
        push(policy, seed=3)
        return values

    monkeypatch.setattr(q_stack.FrozenCritics, "_rule_values", push_meanwhile)
    policy.logits(obs)
    assert relative_error(policy.logit_sums(obs), slow_logit_sums(policy, obs)) < 1e-5


def test_vector_of_parameters():
    """Parameters that are set from a vector are those that act; the stack grows on."""
    policy = make_policy("mlp", **AVERAGE)
    for i in range(7):
        push(policy, seed=i)
    obs = sample_obs(BOX, 6)
    before = both_sums(policy, obs)
    vector = policy.parameters_to_vector()
    version = policy.frozen_critics.version
    policy.load_from_vector(0.5 * vector)
    assert not th.allclose(both_sums(policy, obs), before)
    assert policy.frozen_critics.version != version
    assert_sums(policy, obs)
    policy.load_from_vector(vector)
    assert th.equal(both_sums(policy, obs), before)
    assert_entries_are_live(policy)


def test_weights_move_with_the_stack():
    """Also those that were remembered for another device, here for one without memory."""
    policy = make_policy()
    push(policy, seed=0)
    policy.logits(sample_obs(BOX, 1))
    policy.frozen_critics.to("meta")
    assert policy.frozen_critics.coefs("last").device.type == "meta"


def test_members_of_entries_are_ordinary_modules():
    """Slices are lists, and entries are what was pushed."""
    policy = make_policy("mlp")
    nets = [push(policy, seed=i) for i in range(3)]
    assert isinstance(policy.frozen_critics[:2], list)
    obs = sample_obs(BOX, 6)
    for entry, expected in zip(policy.frozen_critics[:], nets, strict=True):
        for net, other in zip(members(entry), expected, strict=True):
            assert th.equal(net(obs), other(obs))


@pytest.mark.parametrize("average_size", [3, 5, 60])
def test_average_leaves_out_what_has_no_weight(average_size):
    """Critics of the average that lie apart among those of the rule, by ordinary networks one by one."""
    model = make_model(RandomObsEnv(), memory_size=30, average_window=0.5, average_size=average_size)
    grow(model, 35)
    policy, obs = model.policy, sample_obs(model.observation_space, 5)
    with th.no_grad():
        sums = policy.logit_sums(obs, "average")
        assert relative_error(sums, policy.frozen_critics.weights.total * slow_average(policy, obs)) < 1e-5
        assert relative_error(policy.logit_sums(obs), slow_logit_sums(policy, obs)) < 1e-5


def test_parameters_that_are_changed_in_place():
    """After ``gather`` nothing is known of the old ones."""
    model = make_model(memory_size=3, logit_cache=True, learning_starts=10, policy_update_interval=20).learn(60)
    states = model.replay.sample(16).next_observations
    with th.no_grad():
        for param in model.policy.frozen_critics.parameters():
            param.mul_(0.5)
    model.policy.frozen_critics.gather()
    assert relative_error(model.replay.logit_sums(states), slow_logit_sums(model.policy, states)) < 1e-5
