"""Some of the environments act by averages of the stack, one after another, to find the best one to deliver.

Choosing the delivered policy by the training's own episodes is the idea of the checkpoints of TD7,
https://arxiv.org/abs/2306.02451.
"""

import math
from typing import Any

import numpy as np

from sb3_staq.off_policy import CheckedOffPolicyAlgorithm
from sb3_staq.policies import StaQPolicy

# A trial lasts for this share of the steps so far, and for at least one greedy episode
TRIAL_SHARE = 0.05
# A candidate becomes the best only after so many: one or two may be lucky, and a comparison never forgets
MIN_EPISODES = 5


class AverageTrials(CheckedOffPolicyAlgorithm):
    """The part of :class:`~sb3_staq.staq.StaQ` that tries averages: where, for how long, and which one is best."""

    policy: StaQPolicy
    average_share: float  # argument, see StaQ

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # For the environment that alternates: whether it acts by the average now, and how many such steps it is ahead
        self._average_turn, self._average_lead = False, 0.0
        self._forget_returns()

    @property
    def _average_envs(self) -> tuple[int, float]:
        """Number of environments that always act by the average, and the share of its steps for which the next does."""
        part, n_whole = math.modf(round(self.average_share * self.n_envs, 6))
        return int(n_whole), part

    @property
    def _n_average_envs(self) -> int:
        """Number of environments that act by the average now."""
        n_whole, part = self._average_envs
        return n_whole + (self._average_turn and part > 0)

    def _forget_returns(self) -> None:
        """Forget the returns so far, since the next task may be a different one."""
        self._best_return = -math.inf
        self._begin_trial(0)

    def _begin_trial(self, step: int) -> None:
        self._trial_step, self._trial_episode = step, False
        self._trial_returns: list[float] = []

    def _try_average(self, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """
        Record the returns of the candidate, and judge it when its trial is long enough.

        :param dones: whether the episode of each environment has ended
        :param infos: the environments' infos, in which ``Monitor`` puts the returns
        """
        n_whole, part = self._average_envs
        if dones[0] and self._trial_episode and self._n_average_envs > 0 and "episode" in infos[0]:
            self._trial_returns.append(float(infos[0]["episode"]["r"]))
            if self.num_timesteps - self._trial_step >= TRIAL_SHARE * self.num_timesteps:
                self._judge()

        self._average_lead += self._average_turn - part
        if part == 0:  # no environment alternates
            self._average_turn, self._average_lead = False, 0.0
        elif dones[n_whole]:  # between episodes
            self._average_turn = self._average_lead < 0
        if dones[0]:  # whether the first environment's next episode is a whole one of the candidate
            self._trial_episode = self._n_average_envs > 0

    def _judge(self) -> None:
        """Accept or drop the candidate and take the next one, unless it is ahead after too few episodes."""
        stack = self.policy.frozen_critics
        mean_return = float(np.mean(self._trial_returns))
        is_best = mean_return > self._best_return and stack.marked["candidate"][0] > 0
        if is_best and len(self._trial_returns) < MIN_EPISODES:
            return
        if is_best:
            self._best_return = mean_return
        stack.propose(accept=is_best)
        self.logger.record("rollout/candidate_ep_rew_mean", mean_return)
        if self._best_return > -math.inf:
            self.logger.record("rollout/best_ep_rew_mean", self._best_return)
        self._begin_trial(self.num_timesteps)
