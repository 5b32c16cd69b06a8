"""StaQ: policy mirror descent with a growing stack of frozen critics, as an algorithm of Stable-Baselines3."""

import io
import math
import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    PyTorchObs,
    Schedule,
    TrainFreq,
    TrainFrequencyUnit,
)
from stable_baselines3.common.utils import LinearSchedule

from sb3_staq.action_spaces import SUPPORTED_ACTION_SPACES, flatten_action_space
from sb3_staq.arguments import (
    ARGUMENTS,
    check_argument,
    check_arguments,
    check_changed_arguments,
    check_custom_weights,
    defaults_for,
)
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
from sb3_staq.observations import select
from sb3_staq.off_policy import CheckedOffPolicyAlgorithm
from sb3_staq.policies import POLICY_ARGUMENTS, SHAPE_ARGUMENTS, CnnPolicy, MlpPolicy, MultiInputPolicy, StaQPolicy
from sb3_staq.q_networks import CriticEnsemble
from sb3_staq.replay import PolicyReplay, cache_pays
from sb3_staq.save_util import check_algorithm

if TYPE_CHECKING:
    from sb3_staq.distill_report import DistillReport

SelfStaQ = TypeVar("SelfStaQ", bound="StaQ")


class PolicyUpdateInfo(NamedTuple):
    """What a policy update did, for ``policy_update_hooks``."""

    kl_coef: float
    ent_coef: float
    old_weights: StackWeights  # before the update
    deleted: list[CriticEnsemble]  # what it deleted from the weighted sum, oldest first


class StaQ(CheckedOffPolicyAlgorithm):
    """
    StaQ: entropy-regularised policy mirror descent on a stack of frozen critics.

    In turn, the critics are trained towards the soft Q-function of the current policy (policy evaluation), and the
    policy is updated in closed form by freezing a copy of the critics on top of the stack (policy update).

    While training, the policy is the weighted sum of the newest critics. What ``predict``, evaluation callbacks and
    saved models use is by default an average over a longer time, see ``eval_policy``.

    Arguments that are None have a default that depends on the action space: that of a Box with
    ``action_grid="factored"`` stands behind "Box:".

    Paper: https://arxiv.org/abs/2506.13862 (eta there is ``kl_coef`` here, tau there is ``ent_coef`` here; ``tau`` is,
    as everywhere in SB3, the Polyak coefficient)

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy" or a class
    :param env: the environment, or its id
    :param learning_rate: of the optimizer, a number or a schedule. Default: 3e-4, Box: 7e-4
    :param buffer_size: number of transitions in the replay buffer
    :param learning_starts: number of steps with random actions, before any learning
    :param batch_size: number of transitions per gradient step. Default: 256, Box: 128
    :param tau: Polyak coefficient of the target critics, 1 copies them. Default: 0.005, Box: 0.01
    :param gamma: discount factor
    :param train_freq: steps between two calls of ``train``; also ``(5, "step")`` or ``(2, "episode")``
    :param gradient_steps: number of gradient steps per call; -1 is one for each environment step since the last call
    :param memory_size: ``M``, the largest number of frozen critics in the policy that learns. "auto" is what the
        paper's theorem asks for, see :func:`~sb3_staq.memory_bounds.auto_memory_size`: with ``gamma=0.99`` 10 for
        ``kl_coef = ent_coef / 2``, 137 for ``kl_coef = 10 * ent_coef``. Less is cheaper and outside of the guarantee
    :param logit_rule: "weight_corrected" (the published rule: no error from the deletion of old critics), "truncated"
        (a plain truncation of the sum) or "exact" (nothing is deleted, whatever ``memory_size`` says). Or the weights
        of the critics by age, newest first: ``memory_size`` numbers, or a function of the age (0 is the newest);
        ``kl_coef`` then has no effect, and ``ent_coef`` one on the targets only
    :param kl_coef: weight of the KL divergence between successive policies, the larger the smaller their changes: a
        number, a schedule, a ``"lin_..."`` string, see :func:`sb3_staq.coefficients.value_at`, or "rel_FACTOR", that
        multiple of ``ent_coef``. Default: 0.5, Box: "rel_0.5"
    :param ent_coef: weight of the policy's entropy, likewise; must be above 0 for "weight_corrected", where a schedule
        that falls to 0 is followed down to 1% of its first value. "auto" or "auto_FIRST" (0.1 by default) is what
        gives the policy its ``target_entropy``, changed by a factor of at most 1.3 per policy update. Default: 0.05,
        Box: "auto_0.2"
    :param target_entropy: entropy that an automatic ``ent_coef`` keeps on average over replayed states, as a share of
        the largest possible, in (0, 1): a number, a schedule or a ``"lin_..."`` string. "auto" falls from 0.6 to 0.2
        over the training; for a Box with more than 5 values per dimension it stays as many nats below the largest as
        with 5
    :param policy_update_interval: environment steps (of all environments) between two policy updates, at most one per
        gradient step. ``train`` without new steps, as offline, counts its gradient steps instead, at the ratio of the
        two in ``learn``. Default: 500, Box: 100
    :param n_critics: number of critics in the ensemble
    :param critic_reduction: "mean" or "min", what the targets take of the critics' expected values. The policy follows
        their mean. Default: "mean", Box: "min"
    :param target_update_interval: gradient steps between two updates of the target critics
    :param exploration_fraction: share of the training in which the exploration rate goes from its initial to its final
        value
    :param exploration_initial_eps: probability of a uniformly random action at first; all other actions follow the
        softmax policy. Default: 0.05, Box: 0
    :param exploration_final_eps: the same in the end. Default: 0.05, Box: 0
    :param action_grid: which actions of a Box are bins: "factored" (a branch of ``action_bins`` evenly spaced values
        for each dimension), "axis" (the middle of the bounds, and each dimension at either bound) or "joint" (all
        combinations of ``action_bins`` values; for few dimensions)
    :param action_bins: number of values per dimension of a Box, at least 2
    :param critic: "additive" critics have one output per bin, summed over the branches; "joint" ones take state and
        action, as in SAC, and the stack is made of a network of their main effects, see :mod:`sb3_staq.main_effects`.
        Default: "additive", Box: "joint"
    :param eval_policy: the policy that acts outside of the training: "average" of the critics that were frozen over a
        window that grows with the training, or the "last" one. The average lags behind by half of the window while
        the policy improves fast. Can be changed at any time, also as ``model.policy.eval_policy``
    :param average_window: share of the policy updates so far that the window covers
    :param average_size: largest number of critics in the average, evenly spaced in time: the memory that it costs
    :param average_share: share of the environments that collect with the average, so that the replay buffer keeps what
        acting well looks like; the others collect with the last policy. If that is no whole number of environments, one
        of them alternates, episode by episode
    :param reward_scale: factor of the rewards in the targets. Its ratio to ``ent_coef`` decides how greedy the policy
        is
    :param logit_cache: whether the weighted sums of the stack at replayed states are remembered, which costs two
        critics per policy update instead of the whole stack in every target: True, False or "auto" (where it costs
        less; not with HER, normalised observations or custom weights). It takes the memory of the stored next
        observations and 4 bytes per transition and bin; "auto" takes at most 256 MB more than half of the replay buffer
    :param replay_buffer_class: class of the replay buffer, for instance ``HerReplayBuffer``; by default as in SB3
    :param replay_buffer_kwargs: its arguments
    :param optimize_memory_usage: store each observation once, with the limits that this has in SB3
    :param n_steps: number of rewards in the return of a target
    :param stats_window_size: number of episodes over which logged returns and lengths are averaged
    :param tensorboard_log: folder of the logs for TensorBoard; None for none
    :param policy_kwargs: arguments of the policy, see :class:`StaQPolicy`
    :param verbose: 0 for no output, 1 for information, 2 for debugging
    :param seed: of all random generators
    :param device: "cpu", "cuda", ...; "auto" is a GPU if there is one
    :param _init_setup_model: whether to make the networks and the replay buffer at once
    :raise ValueError: if an argument is out of range; the message names it, its value and what is accepted
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: StaQPolicy

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
        # There is no action space yet when a model is loaded, which brings its arguments
        for name, default in defaults_for(getattr(self, "action_space", None), action_grid).items():
            if getattr(self, name) is None:
                setattr(self, name, default)

        self.exploration_rate = 0.0
        self._steps_since_policy_update = 0.0
        self._steps_since_train = 0  # environment steps, from `learning_starts` on
        # Of the environment that collects with both policies: whether with the average now, and how many steps of that
        # it is ahead of its share
        self._average_turn, self._average_lead = False, 0.0
        self._replay: PolicyReplay | None = None
        self._learns = False  # whether `learn` is running
        # Called after each policy update with a PolicyUpdateInfo, for one call of `learn`: callbacks add theirs in
        # `_on_training_start`
        self.policy_update_hooks: list[Callable[[PolicyUpdateInfo], None]] = []

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        check_arguments(self)
        self._check_learning_rate(self.learning_rate, 1.0)
        # Numbers, which can be saved
        self.logit_rule = make_logit_rule(self.logit_rule, self._coefficients().check())
        check_custom_weights(self)
        with self._as_sb3_needs_them():
            super()._setup_model()
        self.policy.action_space = self.action_space
        replay = self.replay
        if self.verbose >= 1:
            self._print_choices(replay)

    @contextmanager
    def _as_sb3_needs_them(self) -> Iterator[None]:
        """
        Let SB3 make policy and replay buffer: of actions that are vectors, with the algorithm's arguments.

        Afterwards users find the action space of their environment, and the arguments that they gave. So a model that
        is loaded with other ``n_steps`` or ``gamma`` gets the replay buffer that suits these.
        """
        names = ("action_space", "policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs")
        given = {name: getattr(self, name) for name in names}
        memory_size = self._coefficients().memory_size_for(*self._coefficients().at(1.0))
        arguments = {name: getattr(self, name) for name in POLICY_ARGUMENTS} | {"memory_size": memory_size}
        self.action_space, self.policy_kwargs = flatten_action_space(self.action_space), self.policy_kwargs | arguments
        self.replay_buffer_kwargs = dict(self.replay_buffer_kwargs)
        try:
            yield
        finally:
            for name, value in given.items():
                setattr(self, name, value)

    def _print_choices(self, replay: PolicyReplay) -> None:
        how = "evaluated directly through the whole stack" if replay.cache is None else "kept in a cache"
        print(f"Logits of replayed states are {how}")
        if self.logit_rule != "weight_corrected":
            return
        asked = auto_memory_size(self.gamma, *self._coefficients().at(1.0))
        if self.policy.memory_size < asked:
            print(f"memory_size={self.memory_size} is below {asked}, the memory that the paper's theorem asks for")

    # Policy evaluation and policy update

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Alternate policy evaluation and policy updates, as many as are due, spread over the gradient steps.

        :param gradient_steps: number of gradient steps
        :param batch_size: transitions per gradient step
        :raise ValueError: if the critics diverge, before the optimizer's step; or if an argument, a schedule or a
            sampled batch has an invalid number
        """
        policy = self.policy
        policy.set_training_mode(True)
        check_changed_arguments(self)
        # Update learning rate according to schedule
        self._check_learning_rate(self.lr_schedule, self._current_progress_remaining)
        self._update_learning_rate(policy.optimizer)
        losses: dict[str, list[th.Tensor]] = defaultdict(list)

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
                losses["critic_loss"].append(critic_loss.detach())
                losses["td_error"].append(td_error.detach().abs().mean())
                loss = critic_loss
                if sweep is not None and policy.main_effects is not None:  # continuous actions only
                    effects_loss = main_effects_loss(policy.main_effects, sweep)
                    losses["main_effects_loss"].append(effects_loss.detach())
                    loss = critic_loss + effects_loss

                if not np.isfinite(loss.item()):  # the one number that each step waits for, before anything changes
                    for name, values in {**losses, "loss": [loss]}.items():
                        self._check_critics(name, values[-1].item())

                policy.optimizer.zero_grad()
                loss.backward()
                policy.optimizer.step()

                self._n_updates += 1
                if self._n_updates % self.target_update_interval == 0:
                    policy.update_targets(self.tau)

            if update_is_due:
                n_updates = self.n_policy_updates
                try:
                    self.update_policy()
                finally:  # it has happened, or it is still due
                    n_updates = self.n_policy_updates - n_updates
                    self._steps_since_policy_update -= n_updates * self.policy_update_interval

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, values in losses.items():
            self.logger.record(f"train/{name}", th.stack(values).mean().item())

    def update_policy(self) -> None:
        """
        Do one policy update, in closed form: freeze a copy of the critics on top of the stack.

        ``train`` calls it whenever an update is due. Call it yourself to set the pace, for instance between calls of
        ``train`` on a replay buffer that was filled otherwise.
        """
        check_changed_arguments(self)
        policy, weights, coefficients = self.policy, self.policy.frozen_critics.weights, self._coefficients()
        states, old_sums = self.replay.sample_states(max(self.batch_size, self.replay.states_at_once))
        old_log_prob = policy.log_prob(old_sums)
        q_new = policy.q_values(policy.additive_critics, states)
        self._check_critics("mean Q-value", q_new.mean().item())
        progress = self._current_progress_remaining
        kl_coef, ent_coef = coefficients.next(progress, weights, old_sums, q_new, policy.branches.sizes)

        # xi_{k+1} = beta * xi_k + alpha * Q_k, and without the deleted critics: pi_{k+1} = softmax(xi_{k+1})
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

    def _phases(self, gradient_steps: int) -> Iterator[tuple[int, bool]]:
        """Spread the policy updates that are due over the gradient steps, at most one for each."""
        new_steps: float = self._steps_since_train
        if not self._learns:  # some steps may be left of a rollout that was stopped
            new_steps = max(new_steps, gradient_steps / self._gradient_steps_per_env_step)
        self._steps_since_train = 0
        n_due, left = divmod(self._steps_since_policy_update + new_steps, self.policy_update_interval)
        n_due = min(int(n_due), gradient_steps)
        self._steps_since_policy_update = n_due * self.policy_update_interval + left
        n_phases = max(n_due, 1)
        for phase in range(n_phases):
            n_steps = gradient_steps * (phase + 1) // n_phases - gradient_steps * phase // n_phases
            yield n_steps, n_due > 0

    @property
    def _gradient_steps_per_env_step(self) -> float:
        """In ``learn``; 1 where it is not known beforehand."""
        assert isinstance(self.train_freq, TrainFreq)
        if self.gradient_steps <= 0 or self.train_freq.unit != TrainFrequencyUnit.STEP:
            return 1.0
        return self.gradient_steps / (self.train_freq.frequency * self.n_envs)

    @property
    def _samples_per_policy_update(self) -> float | None:
        """None where it is not known: a number of gradient steps after each episode."""
        if self.gradient_steps >= 0 and self.train_freq.unit != TrainFrequencyUnit.STEP:  # type: ignore[union-attr]
            return None
        return self._gradient_steps_per_env_step * self.policy_update_interval * self.batch_size

    @staticmethod
    def _check_learning_rate(learning_rate: float | Schedule, progress: float) -> None:
        value_at("learning_rate", learning_rate, progress, ARGUMENTS["learning_rate"].expected)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # A rollout may end after total_timesteps, where a schedule that falls to 0 would be negative
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _check_critics(self, what: str, value: float) -> None:
        """Stop before critics that are not finite are trained on, or get into the policy."""
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

    @property
    def eval_policy(self) -> str:
        """The policy that acts outside of the training, see the argument. The policy object holds the choice."""
        policy = self.__dict__.get("policy")
        return self.__dict__["eval_policy"] if policy is None else policy.eval_policy

    @eval_policy.setter
    def eval_policy(self, eval_policy: str) -> None:
        policy = self.__dict__.get("policy")
        if policy is not None:
            check_argument("eval_policy", eval_policy)
            policy.eval_policy = eval_policy
        self.__dict__["eval_policy"] = eval_policy  # as for any other argument, so that a file brings it

    # Coefficients, which callbacks may change during the training: they are read anew at each policy update

    def _coefficients(self) -> Coefficients:
        target_entropy = self.target_entropy
        if isinstance(target_entropy, str) and target_entropy == "auto":
            target_entropy = default_target_entropy(self.action_space, self.action_grid, self.action_bins)
        arguments = self.kl_coef, self.ent_coef, target_entropy, self.logit_rule, self.memory_size, self.gamma
        return Coefficients(*arguments)

    @property
    def _current_ent_coef(self) -> float:
        """In force since the last policy update, so a part of the policy; at first that of the schedule."""
        ent_coef = self.policy.frozen_critics.weights.ent_coef
        return self._coefficients().at(1.0)[1] if ent_coef is None else ent_coef

    # Acting

    @property
    def replay(self) -> PolicyReplay:
        """The replay buffer as the training sees it: with the policy at the next states."""
        assert self.replay_buffer is not None
        parts = self.replay_buffer, self.policy, self._vec_normalize_env
        if self._replay is None or not self._replay.is_made_of(*parts):
            use_cache, old = self.logit_cache, self._replay
            if use_cache == "auto" and old is not None and old.is_made_of(old.buffer, *parts[1:]):
                use_cache = old.cache is not None  # as before, for a buffer that was loaded
            elif use_cache == "auto":
                use_cache = cache_pays(*parts, self._samples_per_policy_update)
            self._replay = PolicyReplay(*parts, bool(use_cache))
        return self._replay

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Get the actions of the policy that is delivered, see ``eval_policy``, including exploration.

        Actions are uniformly random with probability ``exploration_rate``, unless deterministic.
        ``model.policy.predict`` is without.

        :param observation: one observation, or one for each environment
        :param state: returned as it is; the policy has no memory
        :param episode_start: not used
        :param deterministic: Whether to return the most probable actions, or the mean ones where a Box is factored,
            instead of sampled ones
        :return: actions and ``state``
        """
        actions, state = self.policy.predict(observation, state, episode_start, deterministic)
        if deterministic:
            return actions, state
        shape = np.shape(actions)
        return self._explore(actions.reshape(-1, *self.action_space.shape)).reshape(shape), state  # type: ignore[misc]

    def _explore(self, actions: np.ndarray) -> np.ndarray:
        """Replace each of a batch of actions by a uniformly random one with probability ``exploration_rate``."""
        explores = np.random.rand(len(actions)) < self.exploration_rate
        if explores.any():
            actions[explores] = self.policy.random_actions(int(explores.sum()))
        return actions

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        policy = self.policy
        if self.num_timesteps < learning_starts:
            actions = policy.random_actions(n_envs)
        else:
            with policy.acting_by(self._collecting_sums):
                actions, _ = self.predict(self._last_obs)  # type: ignore[arg-type]
        return actions, policy.scale_action(actions) if isinstance(self.action_space, spaces.Box) else actions

    @th.no_grad()
    def _collecting_sums(self, obs: PyTorchObs) -> th.Tensor:
        """Let the last policy collect, which is the one that learns; in a share of the environments the average."""
        sums = self.replay.logit_sums(obs, remember=False)
        n_average, part = self._average_envs
        n_average += self._average_turn and part > 0
        if n_average > 0:
            sums[:n_average] = self.policy.logit_sums(select(obs, slice(n_average)), average=True)
        return sums

    @property
    def _average_envs(self) -> tuple[int, float]:
        """How many environments collect with the average, and for which share of its steps the next one does."""
        part, n_whole = math.modf(round(self.average_share * self.n_envs, 6))
        return int(n_whole), part

    def _on_stored(self, dones: np.ndarray) -> None:
        if self.num_timesteps < self.learning_starts:
            return
        self.replay.remember_last()
        n_average, part = self._average_envs
        if part == 0:  # nobody takes turns
            self._average_turn, self._average_lead = False, 0.0
            return
        self._average_lead += self._average_turn - part
        if dones[n_average]:  # between episodes
            self._average_turn = self._average_lead < 0

    def _on_step(self) -> None:
        """Count the step, and follow the schedule of the exploration."""
        super()._on_step()
        for name in ("exploration_initial_eps", "exploration_final_eps", "exploration_fraction"):
            check_argument(name, getattr(self, name))
        schedule = LinearSchedule(self.exploration_initial_eps, self.exploration_final_eps, self.exploration_fraction)
        self.exploration_rate = schedule(self._current_progress_remaining)
        self._steps_since_train += max(0, min(self.n_envs, self.num_timesteps - self.learning_starts))
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    # Learning, saving and loading

    def learn(
        self: SelfStaQ,
        total_timesteps: int | float,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str = "StaQ",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfStaQ:
        """Train, as any algorithm of SB3."""
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
        Regress one small network on the policy that is delivered: for robots, which cannot carry a stack.

        :param kwargs: arguments of :func:`sb3_staq.distill.distill`, as ``max_kl``, ``max_steps``, ``progress_bar``
        :return: a policy whose stack holds one critic, and a report of how close it is
        """
        from sb3_staq.distill import distill  # needs tqdm

        return distill(self, **kwargs)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Save the model, as any algorithm of SB3, without the replay buffer."""
        self.eval_policy = self.policy.eval_policy  # where it may have been changed
        super().save(path, exclude, include)

    @classmethod
    def _check_data(cls, data: dict[str, Any], name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        check_algorithm(data, name)
        for argument in SHAPE_ARGUMENTS:
            given = arguments.get(argument, data.get(argument))
            if given != data.get(argument, given):
                raise ValueError(f"Invalid {argument}={given!r}: {name} is of a model with {data[argument]!r}")
        return {} if "eval_policy" in data else {"eval_policy": "last"}  # version 0.1.0 had the last policy only

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer, with what the logit cache remembers, as a pickle file with a checksum or as ".npz".

        :param path: the file
        """
        buffer, cache = self.replay_buffer, self.replay.cache
        vars(buffer)["logit_cache"] = {} if cache is None else cache.state_dict()
        try:
            super().save_replay_buffer(path)
        finally:
            del vars(buffer)["logit_cache"]

    def load_replay_buffer(
        self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True, mmap: bool = False
    ) -> None:
        """Load a replay buffer, and what the cache remembers of its states if that was saved with it."""
        super().load_replay_buffer(path, truncate_last_traj, mmap)
        remembered = vars(self.replay_buffer).pop("logit_cache", {})
        if remembered and self.replay.cache is not None:
            self.replay.cache.load_state_dict(remembered)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_learns", "_replay", "_statistics", "policy_update_hooks"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in self.policy_aliases:
            raise ValueError(f"Invalid policy={policy_name!r}: expected one of {', '.join(self.policy_aliases)}")
        return self.policy_aliases[policy_name]
