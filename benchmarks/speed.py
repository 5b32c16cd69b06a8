"""
What StaQ costs: ``python -m benchmarks.speed``.

One thread, and times are CPU times of that thread: what else runs on the machine takes no part of them (it may still
take some of the caches and of the memory's bandwidth). With ``--device cuda`` times end when the GPU has done all that
was asked of it, so nothing else should run there. The entries are measured in turn, once per repetition; the report
gives medians. No training is needed: stacks are filled with random critics and replay buffers with random data.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import ReplayBufferSamples, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.speed_report import FOLDER, REPETITIONS, write_report
from sb3_staq import StaQ
from sb3_staq.critics import CriticEnsemble, FrozenCritics, _linear_by_numpy, empty_block
from sb3_staq.mirror_descent import expected_value, soft_value

MUJOCO = "HalfCheetah-v4"
OTHER_MUJOCO = ("Hopper-v4", "Walker2d-v4")
NETWORKS = {"net_arch": [256, 256]}
ITERATION = 5000  # environment steps, and gradient steps, between two policy updates in the paper
BATCH_SIZE = 256
KL_COEF, ENT_COEF = 20.0, 0.4


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and where; what costs much is measured in part and scaled up."""

    memory_sizes: tuple[int, ...] = (1, 10, 30, 100, 300)
    n_envs: tuple[int, ...] = (1, 8)
    buffer_size: int = 50_000
    n_collect: int = 160  # environment steps, of ITERATION
    n_gradient_steps: int = 50  # of ITERATION
    n_reevaluated: int = 16 * BATCH_SIZE  # states, of the buffer; the first ones, in fresh memory, take longer
    n_steps: int = 500  # of a training beside SAC or DQN
    compile: bool = True  # whether to try torch.compile
    interval: int = 100  # steps between policy updates where these are frequent
    interval_buffer_size: int = 100_000  # ... and the replay then
    iteration: int = ITERATION
    device: str = "cpu"


QUICK = Sizes((1, 4), (1, 8), 1000, 8, 2, BATCH_SIZE, 20, False, interval_buffer_size=1000)


class CheapEnv(gym.Env):
    """An environment of HalfCheetah's sizes that takes no time, so that it does not hide what acting costs."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (17,), np.float64)
        self.action_space = spaces.Box(-1, 1, (6,), np.float32)
        self._observations = np.random.default_rng(0).normal(size=(1000, 17))
        self._step = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        return self._observations[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._step = (self._step + 1) % 1000
        return self._observations[self._step], 1.0, False, self._step == 0, {}


class ReferenceStack:
    """
    The reference way to evaluate a stack: every layer of all critics by one batched matrix product, everywhere.

    :param stack: the stack, whose parameters are copied
    """

    def __init__(self, stack: FrozenCritics):
        entries = [dict(entry.net.named_parameters()) for entry in stack]
        params = {name: th.cat([entry[name].data for entry in entries]) for name in entries[0]}
        names = sorted({name.rpartition(".")[0] for name in params})
        self.layers = [(params[f"{name}.weight"].mT, params[f"{name}.bias"].unsqueeze(1)) for name in names]
        self.weights = self.layers[0][0].new_tensor(stack.weights.values)

    @th.no_grad()
    def __call__(self, obs: th.Tensor) -> th.Tensor:
        """
        :param obs: observations, shape (batch, observation_dim)
        :return: the weighted sum of the mean of the critics, shape (batch, n_choices)
        """
        x = obs.expand(len(self.layers[0][0]), -1, -1)
        for i, (weight, bias) in enumerate(self.layers):
            x = th.baddbmm(bias, x if i == 0 else x.relu(), weight)
        return th.tensordot(self.weights, x.unflatten(0, (len(self.weights), -1)).mean(dim=1), dims=1)


def seconds_of(action: Callable[[], Any], device: str) -> float:
    """
    :param action: what to do
    :param device: where it computes
    :return: the seconds it took: of CPU time, or until another device has done what it was asked for
    """
    if device == "cpu":
        start = time.process_time()
        action()
        return time.process_time() - start
    th.accelerator.synchronize()
    start = time.perf_counter()
    action()
    th.accelerator.synchronize()
    return time.perf_counter() - start


def make(algo: type[OffPolicyAlgorithm], env: str | type[gym.Env], sizes: Sizes, n_envs: int = 1, **kwargs: Any) -> Any:
    """
    :param algo: the algorithm
    :param env: id or class of the environment
    :param sizes: how much is measured
    :param n_envs: number of environments
    :param kwargs: more arguments of the algorithm
    :return: a model with a full replay buffer, and for StaQ a full stack, that is ready to train
    """
    vec_env = DummyVecEnv([lambda: gym.make(env) if isinstance(env, str) else env()] * n_envs)
    common = dict(buffer_size=sizes.buffer_size, batch_size=BATCH_SIZE, policy_kwargs=dict(NETWORKS), learning_starts=0)
    common.update(train_freq=1, gradient_steps=-1, device=sizes.device, seed=0)
    model = algo("MlpPolicy", vec_env, **{**common, **kwargs})
    model.set_logger(Logger(folder=None, output_formats=[]))
    buffer, rng = model.replay_buffer, np.random.default_rng(0)
    buffer.full = True
    for array in (buffer.observations, buffer.next_observations, buffer.rewards):
        array[:] = rng.normal(size=array.shape)
    for row in buffer.actions:
        row[:] = vec_env.action_space.sample()
    if isinstance(model, StaQ):
        for param in model.policy.critics.parameters():
            param.data = 0.05 * th.randn_like(param)
        for _ in range(model.memory_size):
            push_critics(model)
    model._setup_learn(10**6)
    return model


def push_critics(model: StaQ) -> None:
    """
    :param model: its stack gets a new entry, and its cache, whose values do not matter here, need not be evaluated anew
    """
    model.policy.push_critics(KL_COEF, ENT_COEF)
    if model._logit_cache is not None:
        model._logit_cache._synced = model._logit_cache._fingerprint()


def collect(model: Any, n_steps: int) -> None:
    """
    :param model: it acts and stores its transitions
    :param n_steps: environment steps, of all environments together
    """
    train_freq = TrainFreq(max(n_steps // model.n_envs, 1), TrainFrequencyUnit.STEP)
    model.collect_rollouts(model.env, model._init_callback(None), train_freq, model.replay_buffer)


def update_cache(model: StaQ, subtracts: bool = True) -> None:
    """
    :param model: its whole cache follows an update that deletes an entry
    :param subtracts: whether the deleted entry had a weight that is not negligible
    """
    update, deleted = model.policy.push_critics(KL_COEF, ENT_COEF)
    newest = partial(model.policy.q_values, model.policy.frozen_critics[-1])
    q_deleted = partial(model.policy.q_values, deleted) if subtracts else None
    model._logit_cache.update(update._replace(deletes=subtracts), newest, q_deleted)


def iteration_parts(model: StaQ, way: str, sizes: Sizes) -> dict[str, tuple[Callable[[], Any], float]]:
    """
    :param model: the model
    :param way: "StaQ" or "reference"
    :param sizes: how much is measured
    :return: what to do for each part of an iteration, and the factor from that to the whole part
    """
    evaluate, to_buffer = partial(update_cache, model), 1.0
    if way == "reference":  # acts with its own stack, and evaluates it at all stored states
        reference = ReferenceStack(model.policy.frozen_critics)
        obs = th.randn(sizes.n_reevaluated, 17, device=sizes.device)
        model.policy.logit_sums = lambda obs: reference(obs.float())  # type: ignore[method-assign]
        evaluate = partial(lambda batches: [reference(batch) for batch in batches], obs.split(BATCH_SIZE))
        to_buffer = sizes.buffer_size / sizes.n_reevaluated
    train = partial(model._evaluate_policy, sizes.n_gradient_steps, BATCH_SIZE)
    return {
        "collect": (partial(collect, model, sizes.n_collect), ITERATION / sizes.n_collect),
        "logits of the replay": (evaluate, to_buffer),
        "critic steps": (train, ITERATION / sizes.n_gradient_steps),
        "policy update": (partial(push_critics, model), 1.0),
    }


def measure_iteration(sizes: Sizes, repetitions: int) -> pd.DataFrame:
    """
    :param sizes: how much is measured
    :param repetitions: how often
    :return: seconds of one iteration's parts by way, environment, M and number of environments
    """
    largest = max(sizes.memory_sizes)
    cases = [
        ("StaQ", "synthetic", memory_size, n_envs) for n_envs in sizes.n_envs for memory_size in sizes.memory_sizes
    ]
    cases += [("StaQ", MUJOCO, largest, n_envs) for n_envs in sizes.n_envs]
    cases += [("reference", "synthetic", size, 1) for size in sizes.memory_sizes]
    cases += [("reference", MUJOCO, largest, 1)]
    parts = {}
    for way, env, memory_size, n_envs in cases:
        env_class = CheapEnv if env == "synthetic" else env
        model = make(StaQ, env_class, sizes, n_envs, memory_size=memory_size, action_grid="axis")
        parts[way, env, memory_size, n_envs] = iteration_parts(model, way, sizes)
        collect(model, n_envs)
        model._evaluate_policy(2, BATCH_SIZE)
    rows = []
    for repetition in range(repetitions):
        for case, actions in parts.items():
            for part, (action, factor) in actions.items():
                rows.append((*case, part, factor * seconds_of(action, sizes.device), repetition))
    return pd.DataFrame(rows, columns=["way", "env", "M", "n_envs", "part", "seconds", "repetition"])


def multiply(
    weight: th.Tensor,
    x: th.Tensor,
    n: int,
    product: Callable[[th.Tensor, th.Tensor], th.Tensor],
    part_size: int,
    reads_ahead: bool,
) -> None:
    """
    :param weight: matrices of weights
    :param x: rows for each matrix
    :param n: how often all are multiplied
    :param product: of some of the matrices and their rows
    :param part_size: how many are multiplied at once
    :param reads_ahead: whether these are read once beforehand
    """
    for _ in range(n):
        for weights, rows in zip(weight.split(part_size), x.split(part_size), strict=True):
            if reads_ahead:
                weights.sum()
            product(weights, rows)


def multiply_by_numpy(weight: th.Tensor, x: th.Tensor) -> th.Tensor:
    """
    :param weight: matrices of weights
    :param x: rows for each matrix, up to 3 or a multiple of 4
    :return: the products, as the package computes them where NumPy is faster than PyTorch
    """
    no_bias = weight.new_zeros(weight.shape[:2])
    return _linear_by_numpy(x, weight, no_bias, rows_at_once=4 if x.shape[1] > 3 else 1)


@th.no_grad()
def bare_gradient_step(model: StaQ, samples: ReplayBufferSamples, log_pi: th.Tensor) -> None:
    """
    A gradient step by its operations alone, one after the other and in place where possible: what autograd, sampling
    and logging add is left out. This is about the least that PyTorch's operations allow.

    :param model: its critics, additive ones of a single group with two hidden layers, are trained
    :param samples: a batch of transitions
    :param log_pi: log-probabilities of the choices at its next states
    """
    policy = model.policy
    obs, next_obs = samples.observations.float(), samples.next_observations.float()
    zero_slope_below_0 = th.ops.aten.threshold_backward.grad_input  # of a ReLU, in place

    def forward(ensemble: CriticEnsemble, obs: th.Tensor) -> list[th.Tensor]:
        """Inputs of the layers (n_critics, batch, n_inputs), then outputs (n_critics, n_choices, batch)."""
        w1, b1, w2, b2, w3, b3 = ensemble.params.values()
        x = obs.expand(len(w1), -1, -1)
        hidden_1 = th.baddbmm(b1.unsqueeze(1), x, w1.mT).relu_()
        hidden_2 = th.baddbmm(b2.unsqueeze(1), hidden_1, w2.mT).relu_()
        return [x, hidden_1, hidden_2, th.baddbmm(b3.unsqueeze(2), w3, hidden_2.mT)]

    next_q_values = forward(policy.critics_target, next_obs)[-1].mean(dim=0).T
    next_values = soft_value(log_pi, expected_value(log_pi, next_q_values), model._current_ent_coef)
    targets = samples.rewards + (1 - samples.dones) * model.gamma * next_values.unsqueeze(1)

    x, hidden_1, hidden_2, q_values = forward(policy.critics, obs)
    chosen = policy.action_groups.encode(samples.actions).T.expand(len(q_values), 1, -1)
    td_error = q_values.gather(1, chosen) - targets.T
    grad = th.zeros_like(q_values).scatter_(1, chosen, 2 / len(obs) * td_error).mT

    w1, b1, w2, b2, w3, b3 = policy.critics.params.values()
    w3.grad, b3.grad = th.bmm(grad.mT, hidden_2), grad.sum(dim=1)
    grad = th.bmm(grad, w3)
    zero_slope_below_0(grad, hidden_2, 0, grad_input=grad)
    w2.grad, b2.grad = th.bmm(grad.mT, hidden_1), grad.sum(dim=1)
    grad = th.bmm(grad, w2)
    zero_slope_below_0(grad, hidden_1, 0, grad_input=grad)
    w1.grad, b1.grad = th.bmm(x.mT, grad).mT.contiguous(), grad.sum(dim=1)
    policy.optimizer.step()
    policy.update_targets(model.tau)


def measure_machine(sizes: Sizes, repetitions: int) -> pd.DataFrame:
    """
    :param sizes: how much is measured
    :param repetitions: how often
    :return: what the machine can do with one thread: GB/s of reading, GFLOP/s of large and of narrow matrix products,
        milliseconds of the operations of a gradient step
    """
    device = sizes.device
    model = make(StaQ, CheapEnv, sizes, memory_size=1, action_grid="axis")
    samples, log_pi, _ = next(model._batches(1, BATCH_SIZE))
    step = partial(bare_gradient_step, model, samples, log_pi)
    step()
    block = empty_block(th.empty(0, 256, 256, device=device), 600).normal_()
    size = 1024 if device == "cpu" else 8192
    large = th.randn(size, size, device=device)
    _ = block.sum(), large @ large  # warm-up
    rows = []
    for repetition in range(repetitions):
        for batch_size in (1, 8, 64, BATCH_SIZE):
            # The weights of a stack come from memory; those of a few critics in training stay in the cache of a CPU,
            # but are too little work for a GPU
            in_cache = batch_size == BATCH_SIZE and device == "cpu"
            weight, n = (block[:4], 50) if in_cache else (block, 10)
            x = th.randn(len(weight), batch_size, 256, device=device)
            # The fastest way: either order of the operands, weights stored as PyTorch does or transposed, at once or in
            # parts whose results stay in the cache, with or without reading the weights of a part beforehand; or NumPy
            products: list[Callable[[th.Tensor, th.Tensor], th.Tensor]] = [
                lambda weight, x: th.bmm(weight, x.mT),
                lambda weight, x: th.bmm(x, weight.mT),
                lambda weight, x: th.bmm(x, weight),
            ]
            if device == "cpu":
                products.append(multiply_by_numpy)
            ways = itertools.product(products, (len(block), 32, 4), (False, True))
            seconds = min(seconds_of(partial(multiply, weight, x, n, *way), device) for way in ways) / n
            flops = 2 * weight.numel() * batch_size
            rate = flops / seconds / 1e9
            rows.append((f"matmul with {batch_size} rows", "GFLOP/s", rate, repetition))
        seconds = seconds_of(lambda: [step() for _ in range(sizes.n_gradient_steps)], device) / sizes.n_gradient_steps
        rows.append(("operations of a gradient step", "ms", 1000 * seconds, repetition))
        seconds = seconds_of(lambda: [block.sum() for _ in range(10)], device) / 10
        rows.append(("reading", "GB/s", block.nbytes / seconds / 1e9, repetition))
        # A large product by NumPy may be faster, but several threads would compute it: one in parts is measured above
        rate = max(rate, 2 * size**3 / seconds_of(lambda: large @ large, device) / 1e9)
        rows.append(("large matmul", "GFLOP/s", rate, repetition))
    return pd.DataFrame(rows, columns=["what", "unit", "value", "repetition"])


def measure_acting(sizes: Sizes, repetitions: int) -> pd.DataFrame:
    """
    :param sizes: how much is measured
    :param repetitions: how often
    :return: milliseconds of one pass through the full stack by way and batch size, with what it must read and compute
    """
    model = make(StaQ, CheapEnv, sizes, memory_size=max(sizes.memory_sizes), action_grid="axis")
    stack = model.policy.frozen_critics
    n_bytes = sum(param.nbytes for param in stack.parameters())
    rows = []
    for repetition in range(repetitions):
        for batch_size in (1, 8, 64):
            obs = th.randn(batch_size, 17, device=sizes.device)
            for way, evaluate in {"StaQ": stack, "reference": ReferenceStack(stack)}.items():
                evaluate(obs)
                n_calls = max(1, 40 // batch_size) if sizes.device == "cpu" else 40
                calls = partial(lambda f, x, n: [f(x) for _ in range(n)], evaluate, obs, n_calls)
                seconds = seconds_of(calls, sizes.device) / n_calls
                rows.append((way, batch_size, 1000 * seconds, n_bytes, n_bytes // 2 * batch_size, repetition))
    return pd.DataFrame(rows, columns=["way", "batch_size", "ms", "bytes", "flops", "repetition"])


def measure_steps(sizes: Sizes, repetitions: int) -> pd.DataFrame:
    """
    :param sizes: how much is measured
    :param repetitions: how often
    :return: environment steps per second of trainings with one gradient step per environment step
    """
    memory_size = max(sizes.memory_sizes)
    staq = {"memory_size": memory_size, "action_grid": "axis"}
    cases: list[tuple[str, str, type[OffPolicyAlgorithm], int, dict[str, Any]]] = [("SAC", MUJOCO, SAC, 1, {})]
    cases += [(f"StaQ, M = {memory_size}", MUJOCO, StaQ, n_envs, staq) for n_envs in sizes.n_envs]
    # For a Box these are the settings of the MuJoCo tasks
    defaults = {"batch_size": None, "policy_kwargs": None}
    cases += [("StaQ, default arguments", MUJOCO, StaQ, n_envs, defaults) for n_envs in sizes.n_envs]
    # What of that is due to their batches
    cases += [("SAC, batches of 128", MUJOCO, SAC, max(sizes.n_envs), {"batch_size": 128})]
    for env in OTHER_MUJOCO:
        cases += [("SAC", env, SAC, 1, {}), ("StaQ, default arguments", env, StaQ, max(sizes.n_envs), defaults)]
    cases += [("DQN", "CartPole-v1", DQN, 1, {})]
    cases += [(f"StaQ, M = {memory_size}", "CartPole-v1", StaQ, n_envs, staq) for n_envs in sizes.n_envs]
    rows = []
    models = [(name, env, make(algo, env, sizes, n_envs, **kwargs)) for name, env, algo, n_envs, kwargs in cases]
    for repetition in range(repetitions):
        for name, env, model in models:
            before = model.num_timesteps
            learn = partial(model.learn, sizes.n_steps, reset_num_timesteps=False)
            seconds = seconds_of(learn, sizes.device)
            rows.append((name, env, model.n_envs, (model.num_timesteps - before) / seconds, repetition))
    return pd.DataFrame(rows, columns=["algo", "env", "n_envs", "steps_per_second", "repetition"])


def measure_gradient_steps(sizes: Sizes, repetitions: int) -> pd.DataFrame:
    """
    :param sizes: how much is measured
    :param repetitions: how often
    :return: milliseconds per gradient step and network, and of the pass over 4,096 states that the cache makes
    """
    n = sizes.n_gradient_steps
    staq = make(StaQ, "CartPole-v1", sizes, memory_size=1)
    dqn = make(DQN, "CartPole-v1", sizes)
    obs = th.randn(4096, 4, device=sizes.device)
    train = partial(staq._evaluate_policy, n, BATCH_SIZE)
    predict = partial(staq.policy.q_values, staq.policy.critics, obs)

    def in_bf16(action: Callable[[], Any]) -> None:
        with th.autocast(sizes.device, dtype=th.bfloat16):
            action()

    def in_bf16_products(action: Callable[[], Any]) -> None:
        precision = th.get_float32_matmul_precision()
        th.set_float32_matmul_precision("medium")
        try:
            action()
        finally:
            th.set_float32_matmul_precision(precision)

    cases: dict[tuple[str, str], tuple[Callable[[], Any], int]] = {
        ("gradient step, per network", "DQN"): (partial(dqn.train, n, BATCH_SIZE), n),
        ("gradient step, per network", "StaQ"): (train, 2 * n),
        ("gradient step, per network", "StaQ, bf16 autocast"): (partial(in_bf16, train), 2 * n),
        ("gradient step, per network", "StaQ, products in bf16"): (partial(in_bf16_products, train), 2 * n),
        ("pass of the cache, per network", "StaQ"): (predict, 2),
        ("pass of the cache, per network", "StaQ, bf16 autocast"): (partial(in_bf16, predict), 2),
        ("pass of the cache, per network", "StaQ, products in bf16"): (partial(in_bf16_products, predict), 2),
    }
    if sizes.compile:
        compiled = make(StaQ, "CartPole-v1", sizes, memory_size=1)
        for ensemble in (compiled.policy.critics, compiled.policy.critics_target):
            ensemble.forward = th.compile(ensemble.forward)
        compiled_train = partial(compiled._evaluate_policy, n, BATCH_SIZE)
        cases["gradient step, per network", "StaQ, torch.compile"] = (compiled_train, 2 * n)
    rows = []
    for repetition in range(-1, repetitions):  # the first one is a warm-up
        for (what, how), (action, n_parts) in cases.items():
            rows.append((what, how, 1000 * seconds_of(action, sizes.device) / n_parts, repetition))
    table = pd.DataFrame(rows, columns=["what", "how", "ms", "repetition"])
    return table[table["repetition"] >= 0]


def measure_interval(sizes: Sizes, repetitions: int) -> pd.DataFrame:
    """
    :param sizes: how much is measured
    :param repetitions: how often
    :return: seconds of the cache's update and of the gradient steps between two frequent policy updates, by critic
    """
    memory_size, n = max(sizes.memory_sizes), sizes.n_gradient_steps
    large = replace(sizes, buffer_size=sizes.interval_buffer_size)
    rows = []
    for critic in ("additive", "joint"):
        model = make(StaQ, CheapEnv, large, memory_size=memory_size, critic=critic, logit_cache=True)
        model._evaluate_policy(2, BATCH_SIZE)
        for repetition in range(repetitions):
            train = partial(model._evaluate_policy, n, BATCH_SIZE)
            seconds = sizes.interval / n * seconds_of(train, sizes.device)
            rows.append((critic, "gradient steps", seconds, repetition))
            for part, subtracts in (("logits of the replay", True), ("the newest only", False)):
                update = partial(update_cache, model, subtracts)
                rows.append((critic, part, seconds_of(update, sizes.device), repetition))
    return pd.DataFrame(rows, columns=["critic", "part", "seconds", "repetition"])


def measure_memory(sizes: Sizes) -> pd.DataFrame:
    """
    :param sizes: how much is measured
    :return: bytes of the critics' parameters, of the blocks that hold them, and of the saved model, by M
    """
    rows = []
    for memory_size in sizes.memory_sizes:
        model = make(StaQ, CheapEnv, sizes, memory_size=memory_size, action_grid="axis")
        stack = model.policy.frozen_critics
        blocks = {param.untyped_storage().data_ptr(): param.untyped_storage().nbytes() for param in stack.parameters()}
        with tempfile.TemporaryDirectory() as folder:
            model.save(Path(folder) / "model.zip")
            zip_size = (Path(folder) / "model.zip").stat().st_size
        rows.append((memory_size, sum(param.nbytes for param in stack.parameters()), sum(blocks.values()), zip_size))
    return pd.DataFrame(rows, columns=["M", "parameters", "held", "zip"])


def run(folder: Path, sizes: Sizes, repetitions: int, note: str) -> Path:
    """
    Measure everything.

    :param folder: where to write
    :param sizes: how much is measured
    :param repetitions: how often
    :param note: what else is to be said in the report, for instance what ran at the same time
    :return: the Markdown file
    """
    folder.mkdir(parents=True, exist_ok=True)
    n_threads = th.get_num_threads()
    th.set_num_threads(1)
    try:
        measurements = {
            "iteration": partial(measure_iteration, sizes, repetitions),
            "machine": partial(measure_machine, sizes, repetitions),
            "acting": partial(measure_acting, sizes, repetitions),
            "steps": partial(measure_steps, sizes, repetitions),
            "gradient_steps": partial(measure_gradient_steps, sizes, repetitions),
            "interval": partial(measure_interval, sizes, repetitions),
            "memory": partial(measure_memory, sizes),
        }
        for name, measure in measurements.items():
            measure().to_csv(folder / f"{name}.csv", index=False, float_format="%.5g")
    finally:
        th.set_num_threads(n_threads)
    return write_report(folder, asdict(sizes), repetitions, note)


def main() -> int:
    """
    :return: exit status
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="What StaQ costs.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the report goes")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="of each measurement")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only shows that everything runs")
    parser.add_argument("--device", default="cpu", help="where the networks are, e.g. cuda")
    parser.add_argument("--note", default="", help="a sentence for the report: what else ran on the machine")
    args = parser.parse_args()
    sizes = replace(QUICK if args.quick else Sizes(), device=args.device)
    print(run(args.folder, sizes, args.repetitions, args.note))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
