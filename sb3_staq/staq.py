"""StaQ: policy mirror descent with a growing stack of frozen critics, as a Stable-Baselines3 algorithm."""

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_staq.action_spaces import SUPPORTED_ACTION_SPACES
from sb3_staq.arguments import (
    ARGUMENTS,
    check_arguments,
    check_best_can_be_found,
    check_changed_arguments,
    check_custom_weights,
    defaults_for,
)
from sb3_staq.base_staq import BaseStaQ
from sb3_staq.coefficients import Coefficients, default_target_entropy, value_at
from sb3_staq.main_effects import main_effects_loss
from sb3_staq.memory_bounds import auto_memory_size
from sb3_staq.mirror_descent import (
    LogitRule,
    StackWeights,
    decay_rate,
    entropy,
    kl_divergence,
    make_logit_rule,
    max_entropy,
    soft_value,
)
from sb3_staq.policies import StaQPolicy
from sb3_staq.q_networks import CriticEnsemble

if TYPE_CHECKING:
    from sb3_staq.distill import DistillReport

SelfStaQ = TypeVar("SelfStaQ", bound="StaQ")


class PolicyUpdateInfo(NamedTuple):
    """What a policy update did, for ``policy_update_hooks``."""

    kl_coef: float
    ent_coef: float
    old_weights: StackWeights  # before the update
    deleted: list[CriticEnsemble]  # critics that it removed from the weighted sum, oldest first


class StaQ(BaseStaQ):
    """
    StaQ: entropy-regularised policy mirror descent on a stack of frozen critics.

    It alternates two steps. Policy evaluation trains the critics towards the soft Q-function of the current policy. The
    policy update is in closed form: it freezes a copy of the critics on top of the stack.

    During training, the policy follows the weighted sum of the newest critics. ``predict``, evaluation callbacks and
    saved models use, by default, an average over a longer time, see ``eval_policy``.

    Arguments that are None have a default that depends on the action space; "Box:" marks that of a Box with
    ``action_grid="factored"``.

    Paper: https://arxiv.org/abs/2506.13862 (eta there is ``kl_coef`` here, tau there is ``ent_coef`` here; ``tau`` is,
    as everywhere in SB3, the Polyak coefficient)

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy" or a policy class
    :param env: the environment, or its id
    :param learning_rate: learning rate of the optimizer, a number or a schedule. Default: 3e-4, Box: 7e-4
    :param buffer_size: number of transitions in the replay buffer
    :param learning_starts: number of environment steps with random actions before learning starts
    :param batch_size: number of transitions per gradient step. Default: 256, Box: 128
    :param tau: Polyak coefficient of the target critics; 1 copies the critics. Default: 0.005, Box: 0.01
    :param gamma: discount factor
    :param train_freq: steps of each environment between two calls of ``train``; also ``(5, "step")`` or
        ``(2, "episode")``
    :param gradient_steps: number of gradient steps per call; -1 means one per environment step since the last call
    :param memory_size: ``M``, the largest number of frozen critics in the policy that learns. "auto" is what the
        paper's theorem asks for, up to 300, see :func:`~sb3_staq.memory_bounds.auto_memory_size`: with ``gamma=0.99``,
        10 for ``kl_coef = ent_coef / 2`` and 137 for ``kl_coef = 10 * ent_coef``. Fewer are cheaper, but outside the
        guarantee
    :param logit_rule: "weight_corrected" (the published rule: deleting old critics causes no error), "truncated" (a
        plain truncation of the sum) or "exact" (nothing is deleted, whatever ``memory_size`` says). Or custom weights
        of the critics by age, newest first: ``memory_size`` numbers, or a function of the age (0 is the newest);
        ``kl_coef`` then has no effect (except on ``memory_size="auto"``), and ``ent_coef`` affects only the targets
    :param kl_coef: weight of the KL divergence between successive policies; larger weights give smaller changes if
        ``memory_size`` grows with them. A number, a schedule, a ``"lin_..."`` string (see
        :func:`sb3_staq.coefficients.value_at`) or "rel_FACTOR", that multiple of ``ent_coef``. Default: 0.5, Box:
        "rel_0.5"
    :param ent_coef: weight of the policy's entropy: a number, a schedule or a ``"lin_..."`` string. "weight_corrected"
        needs it above 0: a schedule that falls to 0 is followed only down to 1% of its first value. "auto" or
        "auto_FIRST" (FIRST is 0.1 by default) starts at FIRST and adjusts it to keep ``target_entropy``, by a factor of
        at most 1.3 per policy update. Default: 0.05, Box: "auto_0.2"
    :param target_entropy: entropy that an automatic ``ent_coef`` keeps on average over replayed states, as a share of
        the largest possible, in (0, 1): a number, a schedule or a ``"lin_..."`` string. "auto" falls from 0.6 to 0.2
        over the training; for a Box with more than 5 values per dimension, it stays as many nats below the largest as
        with 5
    :param policy_update_interval: environment steps (of all environments) between two policy updates, of which there is
        at most one per gradient step. If you call ``train`` yourself, as in offline training, its gradient steps count
        as so many environment steps as they have in ``learn``. Default: 500, Box: 100
    :param n_critics: number of critics in the ensemble
    :param critic_reduction: "mean" or "min" of the critics' expected values, for the targets. The policy follows the
        critics' mean. Default: "mean", Box: "min"
    :param target_update_interval: gradient steps between two updates of the target critics; the main effects of a
        ``Box`` follow at every step, by ``tau / target_update_interval``
    :param exploration_fraction: share of the training over which the exploration rate goes from its initial to its
        final value
    :param exploration_initial_eps: initial probability that a component of an action is uniformly random; the others
        follow the softmax policy. A ``Discrete`` action is one component, and so is a Box with the "axis" or "joint"
        grid. Default: 0.05, Box: 0
    :param exploration_final_eps: final probability of it. Default: 0.05, Box: 0
    :param action_grid: which actions of a Box are bins: "factored" (a branch of ``action_bins`` evenly spaced values
        for each dimension), "axis" (the middle of the bounds, and one dimension at a time at either bound) or "joint"
        (all combinations of ``action_bins`` values; for few dimensions)
    :param action_bins: number of values per dimension of a Box, at least 2
    :param critic: "additive" critics have one output per bin, summed over the branches; "joint" ones take state and
        action, as in SAC, and the stack holds networks of their main effects, see :mod:`sb3_staq.main_effects`.
        Default: "additive", Box: "joint"
    :param eval_policy: the policy that acts outside training: the "average" of the critics frozen over a window that
        grows with the training, the "best" such average so far, or the "last" policy. While the policy improves fast,
        the average lags behind by half of the window. "best" is chosen by the returns of episodes in the training: it
        needs ``average_share`` and a ``Monitor``, and is the average until one is accepted. Can be changed at any
        time, also as ``model.policy.eval_policy``
    :param average_window: share of the policy updates so far that the window covers
    :param average_size: largest number of critics in an average, evenly spaced in time; this is its cost in memory, and
        at most three times as much with ``average_share``
    :param average_share: share of the environments that act by averages instead of the policy that learns, to find the
        best one. Each average is tried for 5% of the steps so far and at least one whole episode. The first environment
        acts greedily: its mean return must be ahead of the best by two standard errors, or still ahead after 20
        episodes. If the share is no whole number of environments, one of them alternates, episode by episode
    :param reward_scale: factor applied to the rewards in the targets. Its ratio to ``ent_coef`` decides how greedy the
        policy is
    :param logit_cache: whether to cache the weighted sums of the stack at replayed states: True, False or "auto" (where
        it costs less; not with HER, normalised observations or custom weights). It costs two critics per policy update,
        not the whole stack in every target, and the memory of the stored next observations plus 150 bytes and 4 per bin
        for each transition. "auto" takes at most 256 MB more than half of the replay buffer
    :param replay_buffer_class: class of the replay buffer, for instance ``HerReplayBuffer``; by default as in SB3
    :param replay_buffer_kwargs: keyword arguments of the replay buffer
    :param optimize_memory_usage: store each observation only once, with the same limitations as in SB3
    :param n_steps: number of rewards in the n-step return of a target; it leaves out the entropies of the states in
        between, as SB3's SAC does
    :param stats_window_size: number of episodes over which logged returns and lengths are averaged
    :param tensorboard_log: folder for TensorBoard logs; None for no logs
    :param policy_kwargs: keyword arguments of the policy, see :class:`StaQPolicy`
    :param verbose: 0 for no output, 1 for information, 2 for debugging
    :param seed: seed of all random number generators
    :param device: "cpu", "cuda", ...; "auto" is a GPU if there is one
    :param _init_setup_model: whether to build the networks and the replay buffer at once
    :raise ValueError: if an argument is out of range; the message names it, its value and what is accepted
    """

    def __init__(
        self,
        policy: str | type[StaQPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule | None = None,
        buffer_size: int = 100_000,
        learning_starts: int = 1000,
        batch_size: int | None = None,
        tau: float | None = None,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 4,
        gradient_steps: int = -1,
        memory_size: int | str = "auto",
        logit_rule: LogitRule = "weight_corrected",
        kl_coef: float | str | Schedule | None = None,
        ent_coef: float | str | Schedule | None = None,
        target_entropy: float | str | Schedule = "auto",
        policy_update_interval: int | None = None,
        n_critics: int = 2,
        critic_reduction: str | None = None,
        target_update_interval: int = 1,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float | None = None,
        exploration_final_eps: float | None = None,
        action_grid: str = "factored",
        action_bins: int = 5,
        critic: str | None = None,
        eval_policy: str = "average",
        average_window: float = 0.15,
        average_size: int = 60,
        average_share: float = 0.0,
        reward_scale: float = 1.0,
        logit_cache: bool | str = "auto",
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        super().__init__(
            policy,
            env,
            learning_rate,  # type: ignore[arg-type]  # None is replaced below
            buffer_size,
            learning_starts,
            batch_size,  # type: ignore[arg-type]
            tau,  # type: ignore[arg-type]
            gamma,
            train_freq,
            gradient_steps,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            supported_action_spaces=SUPPORTED_ACTION_SPACES,
            support_multi_env=True,
        )
        self.kl_coef = kl_coef
        self.ent_coef = ent_coef
        self.policy_update_interval: Any = policy_update_interval
        self.critic: Any = critic
        self.critic_reduction: Any = critic_reduction
        self.exploration_initial_eps: Any = exploration_initial_eps
        self.exploration_final_eps: Any = exploration_final_eps
        self.exploration_fraction = exploration_fraction
        self.memory_size = memory_size
        self.logit_rule = logit_rule
        self.target_entropy = target_entropy
        self.n_critics = n_critics
        self.target_update_interval = target_update_interval
        self.action_grid = action_grid
        self.action_bins = action_bins
        self.eval_policy = eval_policy
        self.average_window = average_window
        self.average_size = average_size
        self.average_share = average_share
        self.reward_scale = reward_scale
        self.logit_cache = logit_cache
        # While a model is being loaded there is no action space yet, and its file brings the arguments
        for name, default in defaults_for(getattr(self, "action_space", None), action_grid).items():
            if getattr(self, name) is None:
                setattr(self, name, default)

        # Called with a PolicyUpdateInfo after each policy update. `learn` empties the list when it ends, so callbacks
        # add their hooks in `_on_training_start`
        self.policy_update_hooks: list[Callable[[PolicyUpdateInfo], None]] = []

        if _init_setup_model:
            check_best_can_be_found(self)
            self._setup_model()
            if self.verbose >= 1:
                self._print_choices()

    def _setup_model(self) -> None:
        check_arguments(self)
        self._check_learning_rate(self.learning_rate, 1.0)
        memory_size = self._coefficients().check()
        self.logit_rule = make_logit_rule(self.logit_rule, memory_size)  # a callable becomes numbers, to be saved
        check_custom_weights(self)
        with self._as_sb3_needs_them(memory_size):
            super()._setup_model()
        self.policy.action_space = self.action_space

    def _print_choices(self) -> None:
        how = "evaluated directly through the whole stack" if self.replay.cache is None else "kept in a cache"
        print(f"Logits of replayed states are {how}")
        if self.logit_rule != "weight_corrected":
            return
        coefficients = self._coefficients()
        for progress in (1.0, 0.0):
            kl_coef, ent_coef = coefficients.at(progress)
            kept = coefficients.memory_size_for(kl_coef, ent_coef)
            asked = auto_memory_size(self.gamma, kl_coef, ent_coef)
            if kept < asked:
                with_these = f"with kl_coef={kl_coef:g} and ent_coef={ent_coef:g}"
                print(f"memory_size={kept}: {with_these}, the paper's theorem asks for {asked} critics")
                break

    # Policy evaluation and policy update

    @th.enable_grad()  # Ctrl-C while a th.no_grad() ends leaves gradients off: they come back here
    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Run the gradient steps, with the policy updates that are due spread over them.

        :param gradient_steps: number of gradient steps
        :param batch_size: transitions per gradient step
        :raise ValueError: if the critics diverge (before the optimizer's step), or if an argument, a schedule or a
            sampled batch has an invalid number
        """
        policy = self.policy
        policy.set_training_mode(True)
        check_changed_arguments(self)
        # The learning rate follows its schedule
        self._check_learning_rate(self.lr_schedule, self._current_progress_remaining)
        self._update_learning_rate(policy.optimizer)
        totals: dict[str, th.Tensor | float] = defaultdict(float)

        for n_steps, update_is_due in self._phases(gradient_steps):
            for data in self.replay.batches(n_steps, batch_size):
                with th.no_grad():
                    # Soft value of the next state: V(s') = E_{a~pi_k}[Q(s',a)] + ent_coef * H(pi_k(.|s'))
                    next_q, sweep = policy.expected_q(data.next_observations, data.next_log_prob, data.next_actions)
                    next_v = soft_value(data.next_log_prob, next_q, self._current_ent_coef)
                    # Soft Bellman operator: y = r + gamma * (1 - d) * V(s')
                    discounts = self.gamma if data.discounts is None else data.discounts
                    target_q = self.reward_scale * data.rewards + (1 - data.dones) * discounts * next_v.unsqueeze(1)

                # Each critic has its own regression: mean over the batch, sum over the critics
                td_error = policy.action_values(data.observations, data.actions) - target_q.squeeze(1)
                critic_loss = td_error.square().mean(dim=1).sum()
                loss, losses = critic_loss, {"critic_loss": critic_loss, "td_error": td_error.detach().abs().mean()}
                if sweep is not None and policy.main_effects is not None:  # continuous actions only
                    losses["main_effects_loss"] = main_effects_loss(policy.main_effects, sweep)
                    loss = critic_loss + losses["main_effects_loss"]

                if not np.isfinite(loss.item()):  # the only number that a step waits for, before anything changes
                    for name, value in {**losses, "loss": loss}.items():
                        self._check_critics(name, value.item())
                for name, value in losses.items():
                    totals[name] += value.detach()

                policy.optimizer.zero_grad()
                loss.backward()
                policy.optimizer.step()

                self._n_updates += 1
                # Continuous actions only: as slowly as the targets, but at every step, as policy updates freeze it
                policy.average_main_effects(self.tau / self.target_update_interval)
                if self._n_updates % self.target_update_interval == 0:
                    policy.update_targets(self.tau)

            if update_is_due:
                n_updates, interval = self.n_policy_updates, self.policy_update_interval  # which hooks may change
                try:
                    self.update_policy()
                finally:  # the update has happened, or it is still due
                    self._steps_since_policy_update -= (self.n_policy_updates - n_updates) * interval

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, total in totals.items():
            self.logger.record(f"train/{name}", float(total) / gradient_steps)

    def update_policy(self) -> None:
        """
        Perform one policy update, in closed form: freeze a copy of the critics on top of the stack.

        ``train`` calls this whenever an update is due. Call it yourself to set your own pace, for instance between
        calls of ``train`` on a replay buffer that was filled by other means.
        """
        check_changed_arguments(self)
        policy, weights, coefficients = self.policy, self.policy.frozen_critics.weights, self._coefficients()
        states, old_sums = self.replay.sample_states(self.batch_size)
        old_log_prob = policy.log_prob(old_sums)
        q_new = policy.q_values(policy.additive_critics, states)
        self._check_critics("mean Q-value", q_new.mean().item())
        progress = self._current_progress_remaining
        kl_coef, ent_coef = coefficients.next(progress, weights, old_sums, q_new, policy.branches.sizes)

        # pi_{k+1} = softmax(xi_{k+1}). With the default rule and a full stack,
        # xi_{k+1} = beta * xi_k + alpha / (1 - beta^M) * (Q_k - beta^M * Q_{k-M})
        memory_size = coefficients.memory_size_for(kl_coef, ent_coef)
        update, deleted = policy.push_critics(kl_coef, ent_coef, memory_size)
        self.replay.follow(update, deleted)

        log_prob = policy.log_prob(self.replay.logit_sums(states))
        weights, old_weights = policy.frozen_critics.weights, weights
        max_ent = max_entropy(policy.branches.sizes) or 1.0  # a single bin has no entropy
        self.logger.record("train/entropy", entropy(log_prob).mean().item() / max_ent)
        self.logger.record("train/kl_divergence", kl_divergence(log_prob, old_log_prob).mean().item())
        self.logger.record("train/ent_coef", ent_coef)
        self.logger.record("train/kl_coef", kl_coef)
        self.logger.record("train/beta", decay_rate(kl_coef, ent_coef))
        self.logger.record("train/n_frozen_critics", len(weights))
        self.logger.record("train/oldest_weight", weights.values[0] if weights.full else 0.0)
        self.logger.record("train/n_policy_updates", self.n_policy_updates, exclude="tensorboard")
        for hook in self.policy_update_hooks:
            hook(PolicyUpdateInfo(kl_coef, ent_coef, old_weights, deleted))

    @staticmethod
    def _check_learning_rate(learning_rate: float | Schedule, progress: float) -> None:
        value_at("learning_rate", learning_rate, progress, ARGUMENTS["learning_rate"].expected)

    def _check_critics(self, what: str, value: float) -> None:
        """Stop before non-finite critics are trained further or enter the policy."""
        if not np.isfinite(value):
            raise ValueError(
                f"The critics have diverged: {what} is {value} after {self._n_updates} gradient steps with "
                f"learning_rate={self.learning_rate!r} and reward_scale={self.reward_scale!r}; smaller values are more "
                "stable. Parameters and policy are those of before this step."
            )

    @property
    def n_policy_updates(self) -> int:
        """Number of policy updates so far."""
        return self.policy.frozen_critics.n_updates

    # Coefficients: callbacks may change them during training, so they are read again at each policy update

    def _coefficients(self) -> Coefficients:
        target_entropy = self.target_entropy
        if isinstance(target_entropy, str) and target_entropy == "auto":
            target_entropy = default_target_entropy(self.action_space, self.action_grid, self.action_bins)
        arguments = self.kl_coef, self.ent_coef, target_entropy, self.logit_rule, self.memory_size, self.gamma
        return Coefficients(*arguments)

    @property
    def _current_ent_coef(self) -> float:
        """The value of the last policy update, which is part of the policy; before the first, the schedule's."""
        ent_coef = self.policy.frozen_critics.weights.ent_coef
        return self._coefficients().at(1.0)[1] if ent_coef is None else ent_coef

    # Learning

    @th.enable_grad()  # as for train
    def learn(
        self: SelfStaQ,
        total_timesteps: int | float,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str = "StaQ",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfStaQ:
        """Train the model, like any SB3 algorithm."""
        self._learns = True
        try:
            return super().learn(
                total_timesteps=int(total_timesteps),
                callback=callback,
                log_interval=log_interval,  # type: ignore[arg-type]
                tb_log_name=tb_log_name,
                reset_num_timesteps=reset_num_timesteps,
                progress_bar=progress_bar,
            )
        finally:
            self.policy_update_hooks, self._learns = [], False

    def distill(self, **kwargs: Any) -> "tuple[StaQPolicy, DistillReport]":
        """
        Distil the delivered policy into one small network, for robots that cannot carry a stack.

        :param kwargs: arguments of :func:`sb3_staq.distill.distill`, e.g. ``max_kl``, ``max_steps``, ``progress_bar``
        :return: a policy whose stack holds one critic, and a report on how close it is
        """
        from sb3_staq.distill import distill  # needs tqdm

        return distill(self, **kwargs)
