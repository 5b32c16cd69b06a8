"""The same on a GPU as on the CPU, and no more waiting for it in the gradient steps than one number each."""

import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomObsEnv, grow, make_model, relative_error, sample_obs
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_staq import StaQ

needs_gpu = pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False")
ACTION_SPACES = {
    "discrete": (spaces.Discrete(3, start=1), {}),
    "multi_discrete": (spaces.MultiDiscrete([3, 2]), {}),
    "box_factored": (spaces.Box(-2, 3, (2,), np.float32), {}),
    "box_axis": (spaces.Box(-2, 3, (2,), np.float32), dict(action_grid="axis")),
    "box_joint_critic": (spaces.Box(-2, 3, (2,), np.float32), dict(critic="joint")),
    "multi_discrete_joint_critic": (spaces.MultiDiscrete([3, 2]), dict(critic="joint")),
}


def make(actions="discrete", kind="box", **kwargs):
    action_space, more = ACTION_SPACES[actions]
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    return make_model(RandomObsEnv(kind, action_space=action_space), policy, **{**more, **kwargs})


class CountReads(TorchDispatchMode):
    """Counts the reads of single numbers from tensors (``.item()``, ``float()``, ``if tensor``)."""

    n_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n_reads += func is th.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("logit_cache", [True, False])
@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_gradient_steps_read_one_number_each(actions, logit_cache):
    """The loss, which is tested before the step: on a GPU each read waits for all that is queued. Needs no GPU."""
    model = make(actions, logit_cache=logit_cache)
    model.learn(60)
    model.policy_update_interval = 10**6

    def n_reads(n_steps):  # all from one draw
        with CountReads() as counter:
            model.train(n_steps, batch_size=16)
        return counter.n_reads

    with CountReads() as counter:
        th.zeros(1).item()
    assert counter.n_reads == 1
    assert n_reads(40) - n_reads(20) == 20
    # What is read per draw and per call: whether the batch is finite, and the numbers that are logged
    assert n_reads(20) <= 20 + 10


@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_branches_follow_the_policy_but_are_not_saved(actions):
    """The constants of the action branches move with the policy ("meta" stands in for a GPU); files do not change."""
    model = make(actions)
    assert not any("branches" in key for key in model.policy.state_dict())
    branches = model.policy.to("meta").branches
    bins = th.zeros(5, len(branches.sizes), dtype=th.long, device="meta")
    for tensor in (branches.uniform(5), branches.columns(bins), branches.decode(bins)):
        assert tensor.device.type == "meta"
    assert branches.encode(branches.decode(bins)).shape == bins.shape


@needs_gpu
@pytest.mark.parametrize("kind", ["box", "dict", "discrete"])
@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_training_on_cuda(actions, kind):
    """Everything that learns or acts is on the GPU, and the cache equals a direct evaluation."""
    model = make(actions, kind, device="cuda")
    model.learn(200)
    policy = model.policy
    assert {param.device.type for param in policy.parameters()} == {"cuda"}
    assert len(policy.frozen_critics.weights) == 4
    batch = model.replay.sample(100)
    assert model.replay.cache is not None and batch.next_log_prob.is_cuda
    direct = policy.logit_sums(batch.next_observations)
    assert relative_error(model.replay.logit_sums(batch.next_observations), direct) < 1e-4
    assert relative_error(batch.next_log_prob, policy.log_prob(direct)) < 1e-4
    obs = {"box": np.zeros((7, 4), np.float32), "discrete": np.arange(7)}.get(
        kind, {"a": np.zeros((7, 3), np.float32), "b": np.zeros(7, np.int64)}
    )
    assert len(model.predict(obs)[0]) == 7


@needs_gpu
@pytest.mark.parametrize(("trained_on", "loaded_on"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_save_and_load_between_devices(trained_on, loaded_on, tmp_path):
    """The same logits after loading, to float precision, and training goes on."""
    model = make(device=trained_on)
    model.learn(100)
    obs = sample_obs(model.observation_space, 50)
    expected = model.policy.logits(obs.to(trained_on)).cpu()
    model.save(tmp_path / "model")
    loaded = StaQ.load(tmp_path / "model", env=model.get_env(), device=loaded_on)
    logits = loaded.policy.logits(obs.to(loaded_on))
    assert logits.device.type == loaded_on
    assert relative_error(logits.cpu(), expected) < 1e-4
    loaded.learn(60, reset_num_timesteps=False)


@needs_gpu
@pytest.mark.parametrize("batch_size", [1, 8, 64])
@pytest.mark.parametrize("reduction", ["mean", "min"])
def test_logits_are_those_of_the_cpu(reduction, batch_size):
    model = make(memory_size=30, critic_reduction=reduction, net_arch=(32, 32))
    grow(model, 35)
    obs = sample_obs(model.observation_space, batch_size)
    expected = model.policy.logits(obs)
    precision = th.get_float32_matmul_precision()
    th.set_float32_matmul_precision("highest")
    try:
        assert relative_error(model.policy.to("cuda").logits(obs.cuda()).cpu(), expected) < 1e-5
    finally:
        th.set_float32_matmul_precision(precision)


@needs_gpu
@pytest.mark.parametrize("logit_cache", [True, False])
@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_gradient_steps_wait_once_for_the_gpu(actions, logit_cache):
    """For the loss, which is tested before the step: CUDA reports every synchronisation."""
    model = make(actions, device="cuda", logit_cache=logit_cache)
    model.learn(100)
    model.policy_update_interval = 10**6

    def n_waits(n_steps):  # all from one draw
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            th.set_warn_always(True)
            th.cuda.set_sync_debug_mode("warn")
            try:
                model.train(n_steps, batch_size=16)
            finally:
                th.cuda.set_sync_debug_mode("default")
                th.set_warn_always(False)
        return sum("synchroniz" in str(warning.message) for warning in caught)

    assert n_waits(1) > 0
    assert n_waits(40) - n_waits(20) == 20
