"""
Distillation of the stack into one small network, by regression on the logits of the delivered policy.

The student is a policy whose stack holds one critic, so it predicts, saves, loads and evaluates like any other. It
learns from replayed states and, in rounds as in DAgger (https://arxiv.org/abs/1011.0686), from states it visits itself.
"""

import io
import timeit
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_staq.arguments import DISTILL_ARGUMENTS, check_argument, check_policy_kwargs
from sb3_staq.mirror_descent import centre, kl_divergence, log_policy
from sb3_staq.observations import join, map_fields, select
from sb3_staq.policies import StaQPolicy

try:
    from tqdm import tqdm
except ImportError as error:
    raise ImportError('tqdm is missing. Please run: pip install "sb3-staq[zoo]"') from error

if TYPE_CHECKING:
    from sb3_staq.staq import StaQ

HELD_OUT = 1 / 8  # of the states
STEPS_PER_ROUND, BATCH_SIZE, LEARNING_RATE = 1000, 256, 1e-3
TAU = 0.005  # of the Polyak average, which becomes the student
OBS_NORMALISATION = ("norm_obs", "norm_obs_keys", "obs_rms", "clip_obs", "epsilon")  # attributes of VecNormalize


@dataclass
class PolicyNumbers:
    """What a policy achieves and costs."""

    returns: list[float]  # of the episodes; none without an environment
    n_parameters: int  # of the networks that act
    n_bytes: int  # of the saved policy
    ms_per_action: float  # median of `predict` for one observation

    def __str__(self) -> str:
        returns = f"{np.mean(self.returns):.1f} +/- {np.std(self.returns):.1f}" if self.returns else "-"
        return f"{returns:>20}{self.n_parameters:>14,}{self.n_bytes / 1e6:>12.2f} MB{self.ms_per_action:>11.2f} ms"


@dataclass
class DistillReport:
    """How close a student is to the stack, at states that it was not trained on."""

    kl_mean: float  # of KL(stack || student), in nats, summed over the branches
    kl_max: float
    agreement: float  # share of the branches with the same most probable bin
    max_kl: float  # asked for
    n_steps: int  # gradient steps
    n_states: int  # trained on
    stack: PolicyNumbers
    student: PolicyNumbers
    held_out: Any = field(repr=False)  # observations, a tensor or a dictionary of tensors

    @property
    def reached(self) -> bool:
        """Whether the mean KL divergence is at most ``max_kl``."""
        return self.kl_mean <= self.max_kl

    def __str__(self) -> str:
        return (
            f"KL(stack || student) at held-out states: mean {self.kl_mean:.4g} nats, largest {self.kl_max:.4g}\n"
            f"max_kl={self.max_kl:g} was {'' if self.reached else 'NOT '}reached"
            f" ({self.n_steps:,} gradient steps, {self.n_states:,} states)\n"
            f"Same most probable bin: {self.agreement:.1%}\n"
            f"{'return':>27}{'parameters':>14}{'saved':>15}{'per action':>14}\n"
            f"stack  {self.stack}\nstudent{self.student}"
        )


def _kl(logits: th.Tensor, other: th.Tensor, branch_sizes: Sequence[int]) -> th.Tensor:
    return kl_divergence(log_policy(logits, branch_sizes), log_policy(other, branch_sizes))


@contextmanager
def _undisturbed(model: "StaQ", env: VecEnv | None, seed: int) -> Iterator[None]:
    """Leave the training's random numbers and statistics unchanged, but give its environment, if used, a new seed."""
    normalize: Any = None if env is None else unwrap_vec_normalize(env)
    before = {} if normalize is None else dict(vars(normalize))
    numpy_state = np.random.get_state()
    try:
        with th.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            th.manual_seed(seed)
            np.random.seed(seed)
            if normalize is not None:
                of_training = vars(model.get_vec_normalize_env() or normalize)
                vars(normalize).update({key: x for key, x in of_training.items() if key in OBS_NORMALISATION})
                normalize.training = normalize.norm_reward = False
            yield
    finally:
        np.random.set_state(numpy_state)
        if normalize is not None:
            vars(normalize).update(before)
        if env is not None and env is model.get_env():
            env.seed()  # by NumPy's generator, so that the training meets new episodes
            model._last_obs = None  # the next learn() begins with a new episode


def _wrap(model: "StaQ", env: GymEnv | str | None) -> VecEnv | None:
    """Wrap an environment like the model's own, if it is not that one."""
    own: Any = model.get_env()
    parts = [] if own is None else [own.unwrapped, *(part.unwrapped for part in getattr(own.unwrapped, "envs", []))]
    if env is None or (not isinstance(env, str) and any(env.unwrapped is part for part in parts)):
        return own
    normalize, vec_env = model.get_vec_normalize_env(), model._wrap_env(maybe_make_env(env, 0))
    check_for_correct_spaces(vec_env, model.observation_space, model.action_space)
    if normalize is not None and normalize.norm_obs and unwrap_vec_normalize(vec_env) is None:
        raise ValueError(f"Invalid env={env!r}: expected one in VecNormalize, as that of the model")
    return vec_env


class _States:
    """A source of new states: those of the replay buffer, each once, and those a policy visits in the environment."""

    def __init__(self, model: "StaQ", env: VecEnv | None):
        self.model, self.env, self.buffer = model, env, model.replay_buffer
        n_replayed = 0 if self.buffer is None else self.buffer.size() * self.buffer.n_envs
        if n_replayed < 2 and env is None:
            raise ValueError(
                "Invalid env=None: expected an environment, as the model has neither one nor two replayed states"
            )
        self.order = np.random.permutation(n_replayed)
        self.obs: Any = None
        if env is not None:
            env.seed()  # by NumPy's generator, which has the seed
            self.obs = env.reset()

    def collect(self, actor: StaQPolicy, n: int, deterministic: bool) -> Any:
        """Return up to n states of each kind, as tensors; None if all are used up."""
        parts: list[Any] = []
        rows, self.order = self.order[:n], self.order[n:]
        if self.buffer is not None and len(rows):
            normalize: Any = self.model.get_vec_normalize_env() or (self.env and unwrap_vec_normalize(self.env))
            obs: Any = select(self.buffer.observations, np.divmod(rows, self.buffer.n_envs))
            space: Any = self.buffer.observation_space  # of a Discrete, the buffer stores arrays of one number
            space = space.spaces if isinstance(space, spaces.Dict) else space
            obs = map_fields(lambda x, part: x.reshape(-1, *part.shape), obs, space)
            parts.append(obs if normalize is None else normalize.normalize_obs(obs))
        for _ in range(0 if self.env is None else -(-n // self.env.num_envs)):
            parts.append(self.obs)
            actions: Any = actor.predict(self.obs, deterministic=deterministic)[0]
            self.obs = self.env.step(actions)[0]  # type: ignore[union-attr]
        return join([self.model.policy.obs_to_tensor(part)[0] for part in parts]) if parts else None


def _make_student(policy: StaQPolicy, policy_kwargs: dict[str, Any]) -> StaQPolicy:
    """Make a policy of the same class whose stack holds one critic, by default like those of its stack."""
    arguments = policy._get_constructor_parameters()
    arguments.update(
        net_arch=policy.net_arch["pi"] if isinstance(policy.net_arch, dict) else policy.net_arch,
        layer_norm=policy.layer_norm and policy.critic == "additive",
        lr_schedule=lambda _: LEARNING_RATE,
        logit_rule="weight_corrected",
        **dict(critic="additive", n_critics=1, memory_size=1, average_size=0, eval_policy="last"),
    )
    for name in ("features_extractor", "optimizer"):
        if f"{name}_class" in policy_kwargs:  # the arguments of the old class may not be those of the new one
            arguments[f"{name}_kwargs"] = None
    return type(policy)(**{**arguments, **policy_kwargs}).to(policy.device)


def _measure_policy(policy: StaQPolicy, obs: Any, env: VecEnv | None, n_episodes: int, seed: int) -> PolicyNumbers:
    """
    Measure what a policy achieves and costs.

    :param policy: the policy
    :param obs: observations, a tensor or a dictionary of tensors; the time is measured at the first
    :param env: where it acts deterministically, each episode with its own seed; None for no returns
    :param n_episodes: number of episodes
    :param seed: the first seed
    :return: the numbers
    """
    returns: list[float] = []
    while env is not None and len(returns) < n_episodes:
        env.seed(seed + len(returns))
        n = min(env.num_envs, n_episodes - len(returns))
        returns += evaluate_policy(policy, env, n, return_episode_rewards=True, warn=False)[0]  # type: ignore
    first = map_fields(lambda x: x[0].cpu().numpy(), obs)
    times = timeit.repeat(lambda: policy.predict(first, deterministic=True), number=1, repeat=50)
    policy.save(file := io.BytesIO())
    stack = policy.frozen_critics
    n_acting = int(stack.coefs(policy.eval_policy).count_nonzero())
    n_parameters = n_acting * sum(param[0].numel() for param in stack.newest.params.values())
    return PolicyNumbers(returns, n_parameters, file.tell(), 1000 * float(np.median(times)))


@th.enable_grad()  # as for StaQ.train
def distill(
    model: "StaQ",
    max_kl: float = 0.01,
    max_steps: int = 20_000,
    policy_kwargs: dict[str, Any] | None = None,
    env: GymEnv | str | None = None,
    states_per_round: int = 4000,
    n_eval_episodes: int = 20,
    seed: int = 0,
    progress_bar: bool = False,
) -> tuple[StaQPolicy, DistillReport]:
    """
    Distil the delivered policy, see ``eval_policy``, into one network by regression on its logits.

    Each round adds replayed states and states visited in ``env`` (by the stack at first, then by the student; with
    sampled and deterministic actions in turn), holds out an eighth of them, and does 1000 gradient steps. The loss is
    the squared error of the logits, up to a constant per branch, plus the KL divergence. The training's statistics
    and random numbers stay as they are, but the model's own environment, if used, is reset: it gets a new seed from
    NumPy's generator, and its ``Monitor`` records the episodes.

    :param model: the model, with a replay buffer or an environment
    :param max_kl: stop once the mean of ``KL(stack || student)`` over the held-out states is at most this
    :param max_steps: largest number of gradient steps
    :param policy_kwargs: the student's architecture, as for :class:`StaQPolicy` (``dict(net_arch=[64, 64])``), by
        default that of one critic of the stack
    :param env: the environment to visit states and to compare returns in, by default the model's
    :param states_per_round: number of states of each kind that a round adds
    :param n_eval_episodes: number of evaluation episodes per policy, with deterministic actions and the same seeds
    :param seed: seed of all random numbers
    :param progress_bar: whether to show a progress bar
    :return: the student and a report, which says whether ``max_kl`` was reached
    """
    check_policy_kwargs(policy_kwargs := {} if policy_kwargs is None else policy_kwargs, "additive")
    for name in DISTILL_ARGUMENTS:
        check_argument(name, locals()[name], DISTILL_ARGUMENTS)
    policy, sizes, vec_env = model.policy, model.policy.branches.sizes, _wrap(model, env)
    if not policy.frozen_critics:
        raise ValueError(f"Invalid model={model!r}: expected one with at least one policy update")
    if model._learns and vec_env is model.get_env():
        raise ValueError(
            f"Invalid env={env!r}: expected another environment than the one in which the model is learning"
        )
    made: Any = closing(vec_env) if isinstance(env, str) and vec_env is not None else nullcontext()
    with made, _undisturbed(model, vec_env, seed), tqdm(total=max_steps, disable=not progress_bar, unit="step") as bar:
        student, states = _make_student(policy, policy_kwargs), _States(model, vec_env)
        critics: Any = student.critics
        trained, tested, scale, n_steps = list[Any](), list[Any](), 1.0, 0
        while True:
            new = states.collect(student if trained else policy, states_per_round, len(trained) % 2 == 1)
            if new is not None:
                with th.no_grad():
                    new_logits = centre(policy.logits(new), sizes)
                held_out = th.randperm(len(new_logits)) < HELD_OUT * len(new_logits)
                trained.append((select(new, ~held_out), new_logits[~held_out]))
                tested.append((select(new, held_out), new_logits[held_out]))
            (obs, logits), (test_obs, test_logits) = (map(join, zip(*x, strict=True)) for x in (trained, tested))
            with th.no_grad():
                student_logits = student.logits(test_obs)
            kl = _kl(test_logits, student_logits, sizes)
            bar.set_postfix(kl=f"{kl.mean().item():.3g}")
            if n_steps >= max_steps or (n_steps > 0 and kl.mean() <= max_kl):
                break
            if n_steps == 0:  # the student's outputs are of the order of 1
                scale = max(logits.square().mean().sqrt().item(), 1e-6)
            for rows in th.randint(len(logits), (min(STEPS_PER_ROUND, max_steps - n_steps), BATCH_SIZE)):
                outputs = centre(critics.q_values(student.preprocess(select(obs, rows))), sizes)
                loss = (outputs - logits[rows] / scale).square().mean()
                loss = loss + _kl(logits[rows], scale * outputs, sizes).mean()
                student.optimizer.zero_grad()
                loss.backward()
                student.optimizer.step()
                student.update_targets(TAU)
                n_steps += 1
                bar.update()
            student.frozen_critics.push(student.critics_target, 0.0, 1 / scale)  # type: ignore[arg-type]
        same = policy.branches.mode(test_logits) == policy.branches.mode(student_logits)
        worth = [_measure_policy(x, test_obs, vec_env, n_eval_episodes, seed) for x in (policy, student)]
    closeness = kl.mean().item(), kl.max().item(), same.float().mean().item()
    return student, DistillReport(*closeness, max_kl, n_steps, len(logits), worth[0], worth[1], test_obs)
