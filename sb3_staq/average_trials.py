"""Some of the environments act by averages of the stack, one after another, to find the best one to deliver.

Choosing the delivered policy by the training's own episodes is the idea of the checkpoints of TD7,
https://arxiv.org/abs/2306.02451.
"""

import math
import warnings
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.vec_env import VecMonitor, is_vecenv_wrapped

from sb3_staq.arguments import check_argument
from sb3_staq.env_state import all_wrapped
from sb3_staq.off_policy import CheckedOffPolicyAlgorithm
from sb3_staq.policies import StaQPolicy

# A trial lasts for this share of the steps so far, and for at least one greedy episode
TRIAL_SHARE = 0.05
# A candidate becomes the best once it is ahead by two standard errors, or after so many episodes: a few may be lucky,
# and the comparison never forgets
ENOUGH_EPISODES = 20
# The spread of the episodes is that of all trials, of which older ones count less and less, by this factor per trial
FORGETTING = 0.9


def _standard_error(returns: list[float], squares: float, freedom: float) -> tuple[float, float, float]:
    """
    Compute the standard error of the mean return of a trial, with a variance that is pooled over trials.

    :param returns: of the trial
    :param squares: squared deviations of earlier returns from the means of their trials, summed
    :param freedom: degrees of freedom of these
    :return: the error, infinite without any freedom; then ``squares`` and ``freedom`` with this trial
    """
    n = len(returns)
    squares, freedom = squares + n * float(np.var(returns)), freedom + n - 1
    return math.sqrt(squares / freedom / n) if freedom > 0 else math.inf, squares, freedom


class AverageTrials(CheckedOffPolicyAlgorithm):
    """The part of :class:`~sb3_staq.staq.StaQ` that tries averages: where, for how long, and which one is best."""

    policy: StaQPolicy
    average_share: float  # argument, see StaQ

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # For the environment that alternates: whether it acts by the average now, and how many such steps it is ahead
        self._average_turn, self._average_lead = False, 0.0
        self._monitored: bool | None = None  # whether a Monitor reports the returns of episodes; None: not asked yet
        self._forget_returns()

    @property
    def _average_envs(self) -> tuple[int, float]:
        """Number of environments that always act by the average, and the share of its steps for which the next does."""
        check_argument("average_share", self.average_share)  # callbacks may have changed it
        part, n_whole = math.modf(round(self.average_share * self.n_envs, 6))
        return int(n_whole), part

    @property
    def _n_average_envs(self) -> int:
        """Number of environments that act by the average now."""
        n_whole, part = self._average_envs
        return n_whole + (self._average_turn and part > 0)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Set the environment, as in SB3. The best average is chosen anew: the task may be a different one."""
        super().set_env(env, force_reset)
        self._forget_returns()

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[int, BaseCallback]:
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)
        if reset_num_timesteps:
            self._trial_step, self._trial_episode = 0, False
        assert self.env is not None
        self._monitored = None
        if self.policy.eval_policy == "best" and any(self._average_envs) and not self._reports_returns():
            warnings.warn(
                "eval_policy='best' is the average: without a Monitor or VecMonitor around the environments, no return "
                "tells which average is the best",
                UserWarning,
                stacklevel=4,
            )
        return result

    def _reports_returns(self) -> bool:
        """Ask whether the environments have a Monitor, once per call of ``learn``."""
        if self._monitored is None:
            assert self.env is not None
            self._monitored = is_vecenv_wrapped(self.env, VecMonitor) or all_wrapped(self.env, Monitor)
        return self._monitored

    def _forget_returns(self) -> None:
        """Forget the returns so far, since the next task may be a different one."""
        self._best_return = -math.inf
        self._squares, self._freedom = 0.0, 0.0  # see _standard_error
        self._begin_trial(0)

    def _begin_trial(self, step: int) -> None:
        self._trial_step, self._trial_episode = step, False
        self._trial_returns: list[float] = []

    def _try_average(self, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """
        Follow a step of the environments: the candidate's returns, and whose turn it is.

        :param dones: whether episodes have ended
        :param infos: the environments' infos, in which ``Monitor`` puts the returns
        """
        n_whole, part = self._average_envs
        if (n_whole or part) and self._reports_returns():  # other ends are lost lives (``EpisodicLifeEnv``)
            dones = np.array(["episode" in info or info.get("TimeLimit.truncated", False) for info in infos])
        self._trial_episode = self._trial_episode and self._n_average_envs > 0
        if dones[0] and self._trial_episode and "episode" in infos[0]:
            self._record(float(infos[0]["episode"]["r"]))
        self._alternate(part, part > 0 and bool(dones[n_whole]))
        if dones[0]:  # whether the first environment's next episode is a whole one of the candidate
            self._trial_episode = self._n_average_envs > 0

    def _record(self, episode_return: float) -> None:
        """Record the return of a whole episode of the candidate, and judge it when its trial is long enough."""
        self._trial_returns.append(episode_return)
        if self.num_timesteps - self._trial_step >= TRIAL_SHARE * self.num_timesteps:
            self._judge()

    def _alternate(self, share: float, between_episodes: bool) -> None:
        """
        Decide whose turn it is in the environment that alternates.

        :param share: the average's share of its steps; 0 if no environment alternates
        :param between_episodes: whether an episode has just ended there
        """
        self._average_lead += self._average_turn - share
        if share == 0:
            self._average_turn, self._average_lead = False, 0.0
        elif between_episodes:
            self._average_turn = self._average_lead < 0

    def _judge(self) -> None:
        """Accept or drop the candidate and take the next one, unless it is ahead and that may be luck."""
        stack = self.policy.frozen_critics
        mean_return = float(np.mean(self._trial_returns))
        error, squares, freedom = _standard_error(self._trial_returns, self._squares, self._freedom)
        is_best = mean_return > self._best_return and stack.marked["candidate"][0] > 0
        is_clear = len(self._trial_returns) >= ENOUGH_EPISODES or mean_return - self._best_return >= 2 * error
        if is_best and not is_clear:
            return
        if is_best:
            self._best_return = mean_return
        self._squares, self._freedom = FORGETTING * squares, FORGETTING * freedom
        stack.propose(accept=is_best)
        self.logger.record("rollout/candidate_ep_rew_mean", mean_return)
        if self._best_return > -math.inf:
            self.logger.record("rollout/best_ep_rew_mean", self._best_return)
        self._begin_trial(self.num_timesteps)
