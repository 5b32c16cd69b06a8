"""The report of a distillation: how close the student is, and what both policies achieve and cost."""

import io
import timeit
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_staq.observations import map_fields
from sb3_staq.policies import StaQPolicy


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


def measure_policy(policy: StaQPolicy, obs: Any, env: VecEnv | None, n_episodes: int, seed: int) -> PolicyNumbers:
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
