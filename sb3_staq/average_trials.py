"""Some of the environments try averages of the stack, one after another, to find the best one to deliver.

Choosing the delivered policy by the training's own episodes is the idea of the checkpoints of TD7,
https://arxiv.org/abs/2306.02451.
"""

import math
from typing import Any

import numpy as np

from sb3_staq.off_policy import CheckedOffPolicyAlgorithm
from sb3_staq.policies import StaQPolicy

# A trial lasts for this share of the steps so far, and for at least one complete episode in each of the environments
TRIAL_SHARE = 0.05


class AverageTrials(CheckedOffPolicyAlgorithm):
    """The part of :class:`~sb3_staq.staq.StaQ` that tries averages: where, for how long, and which one is best."""

    policy: StaQPolicy
    average_share: float  # argument, see StaQ

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # For the environment that alternates: whether it tries an average now, and how many such steps it is ahead
        self._average_turn, self._average_lead = False, 0.0
        self._forget_returns()

    @property
    def _average_envs(self) -> tuple[int, float]:
        """Number of environments that always try averages, and the share of its steps for which the next one does."""
        part, n_whole = math.modf(round(self.average_share * self.n_envs, 6))
        return int(n_whole), part

    @property
    def _n_average_envs(self) -> int:
        """Number of environments that try an average now."""
        n_whole, part = self._average_envs
        return n_whole + (self._average_turn and part > 0)

    def _forget_returns(self) -> None:
        """Forget the returns so far, since the next task may be a different one."""
        self._best_return = -math.inf
        self._begin_trial(0)

    def _begin_trial(self, step: int) -> None:
        self._trial_step = step
        # Environments whose current episode began with the candidate; and pairs of environment and return
        self._trial_envs: list[int] = []
        self._trial_returns: list[tuple[int, float]] = []

    def _try_average(self, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """
        Record the returns of the candidate, and end its trial when it is long enough.

        :param dones: whether the episode of each environment has ended
        :param infos: the environments' infos, in which ``Monitor`` puts the returns
        """
        ended = np.flatnonzero(dones).tolist()
        for i in ended:
            if i < self._n_average_envs and i in self._trial_envs and "episode" in infos[i]:
                self._trial_returns.append((i, float(infos[i]["episode"]["r"])))
        n_whole, part = self._average_envs
        n_tried = len({i for i, _ in self._trial_returns})
        is_long_enough = self.num_timesteps - self._trial_step >= TRIAL_SHARE * self.num_timesteps
        if n_tried > 0 and n_tried >= n_whole + math.ceil(part) and is_long_enough:
            self._end_trial()

        self._average_lead += self._average_turn - part
        if part == 0:  # no environment alternates
            self._average_turn, self._average_lead = False, 0.0
        elif dones[n_whole]:  # between episodes
            self._average_turn = self._average_lead < 0
        begun = [i for i in ended if i < self._n_average_envs]
        self._trial_envs = sorted({*self._trial_envs}.difference(ended).union(begun))

    def _end_trial(self) -> None:
        """Accept the candidate as the best average if its mean return is the highest so far, and take the next one."""
        stack = self.policy.frozen_critics
        mean_return = float(np.mean([value for _, value in self._trial_returns]))
        is_best = mean_return > self._best_return and stack.marked["candidate"][0] > 0
        if is_best:
            self._best_return = mean_return
        stack.propose(accept=is_best)
        self.logger.record("rollout/candidate_ep_rew_mean", mean_return)
        if self._best_return > -math.inf:
            self.logger.record("rollout/best_ep_rew_mean", self._best_return)
        self._begin_trial(self.num_timesteps)
