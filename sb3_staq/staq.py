"""StaQ: policy mirror descent with a growing stack of frozen critics, as an algorithm of Stable-Baselines3."""

import copy
import io
import math
import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    ReplayBufferSamples,
    Schedule,
    TrainFreq,
    TrainFrequencyUnit,
)
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_staq.action_spaces import SUPPORTED_ACTION_SPACES, flatten_action_space
from sb3_staq.buffer_files import check_buffer, load_buffer, save_buffer
from sb3_staq.buffers import LogitCache, split_samples
from sb3_staq.critics import CriticEnsemble
from sb3_staq.mirror_descent import (
    LogitRule,
    PolicyUpdate,
    StackWeights,
    decay_rate,
    entropy,
    kl_divergence,
    log_policy,
    make_logit_rule,
    max_entropy,
    soft_value,
    solve_ent_coef,
)
from sb3_staq.plain_json import add_arguments, without_pickles
from sb3_staq.policies import CnnPolicy, DrawnActions, MlpPolicy, MultiInputPolicy, StaQPolicy
from sb3_staq.save_util import atomic_write, check_algorithm, open_archive
from sb3_staq.schedules import make_schedule, parse_auto, parse_relative
from sb3_staq.validation import POLICY_ARGUMENTS, check_arguments, check_coefficients

# What arguments that are None stand for
DEFAULTS = {
    "learning_rate": 3e-4,
    "batch_size": 256,
    "tau": 0.005,
    "critic": "additive",
    "critic_reduction": "mean",
    "memory_size": 50,
    "kl_coef": 0.5,
    "ent_coef": 0.05,
    "policy_update_interval": 500,
    "exploration_initial_eps": 0.05,
    "exploration_final_eps": 0.05,
}
# ... where a Box is factored: the settings of the MuJoCo tasks, which follow the scale of the rewards
FACTORED_BOX_DEFAULTS = {
    "learning_rate": 7e-4,
    "batch_size": 128,
    "tau": 0.01,
    "critic": "joint",
    "critic_reduction": "min",
    "memory_size": 4,
    "kl_coef": "rel_0.5",
    "ent_coef": "auto_0.2",
    "policy_update_interval": 100,
    "exploration_initial_eps": 0.0,
    "exploration_final_eps": 0.0,
}
# An automatic ent_coef changes by this factor per policy update at most
MAX_ENT_COEF_CHANGE = 1.3
# ... and falls to this share of its first value at most: where all values are equal, none gives the entropy wanted
MIN_ENT_COEF = 1e-6
# Mean entropy of the policy that an automatic ent_coef keeps, as a share of the largest: at the start and at the end
DEFAULT_TARGET_ENTROPY = (0.6, 0.2)
# ... of a Box with so many values per dimension
DEFAULT_TARGET_ENTROPY_BINS = 5
# Replayed states that an automatic ent_coef is found with, and that the logged entropy and KL are means over; gradient
# steps draw at most so many at a time
MIN_UPDATE_STATES = 1024

SelfStaQ = TypeVar("SelfStaQ", bound="StaQ")
# What `_setup_model` or `learn` makes anew; and a path that a file from elsewhere must not choose
DERIVED = (
    *("lr_schedule", "kl_coef_schedule", "ent_coef_schedule", "target_entropy_schedule", "exploration_schedule"),
    *("_last_obs", "_last_original_obs", "_last_episode_starts", "tensorboard_log"),
)
PolicyUpdateHook = Callable[[float, float, StackWeights, CriticEnsemble | None], None]


class StaQ(OffPolicyAlgorithm):
    """
    StaQ: entropy-regularised policy mirror descent on a stack of frozen critics.

    In turn, the critics are trained towards the soft Q-function of the current policy (policy evaluation), and the
    policy is updated in closed form by freezing a copy of the critics on top of the stack (policy update).

    Arguments that are None get the value of ``DEFAULTS``, or of ``FACTORED_BOX_DEFAULTS`` if the action space is a Box
    with ``action_grid="factored"``.

    Paper: https://arxiv.org/abs/2506.13862 (eta there is ``kl_coef`` here, tau there is ``ent_coef`` here; ``tau`` is,
    as everywhere in SB3, the Polyak coefficient)

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The critics' learning rate, it can be a function of the current progress remaining
        (from 1 to 0)
    :param buffer_size: size of the replay buffer
    :param learning_starts: how many steps of the model to collect transitions for before learning starts
    :param batch_size: Minibatch size for each gradient update
    :param tau: the soft update coefficient of the target critics ("Polyak update", between 0 and 1), 1 for hard update
    :param gamma: the discount factor
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit
        like ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many gradient steps to do after each rollout (see ``train_freq``)
        Set to ``-1`` means to do as many gradient steps as steps done in the environment during the rollout.
    :param memory_size: ``M``, the number of frozen critics that the policy is made of at most. Acting costs M critics,
        so no more than what the weights, which fall as ``(kl_coef / (kl_coef + ent_coef))**age``, make use of
    :param logit_rule: "weight_corrected" (the published rule: no error from the deletion of old critics), "truncated"
        (a plain truncation of the sum), "exact" (nothing is deleted, whatever ``memory_size`` says); or custom weights
        of the critics in the logits by age, newest first: ``memory_size`` numbers, or a callable of the age (0 is the
        newest), evaluated once. ``kl_coef`` then has no effect, and ``ent_coef`` only one on the targets.
    :param kl_coef: weight of the KL divergence between successive policies (number, schedule or "lin_..." string,
        see :func:`sb3_staq.schedules.make_schedule`): larger values change the policy less per update. "rel_FACTOR" is
        that multiple of ``ent_coef``.
    :param ent_coef: weight of the policy's entropy, likewise; must be above 0 for "weight_corrected". A schedule that
        falls to 0 is followed down to 1% of its first value there. "auto" or "auto_FIRST" (0.1 by default): at each
        policy update what gives the policy its ``target_entropy``, changed by a factor of 1.3 per update at most
    :param target_entropy: mean entropy over replayed states that an automatic ``ent_coef`` keeps, as a share of the
        largest possible, in (0, 1) (number, schedule or "lin_..." string). "auto" falls from 0.6 to 0.2 over the
        training; for a Box with more than 5 values per dimension, between the shares that are as many nats from the
        uniform policy as these are for 5 (from 0.71 to 0.41 for 9).
    :param policy_update_interval: environment steps (all environments counted) between two policy updates. There is at
        most one policy update per gradient step.
    :param n_critics: number of critics in the ensemble
    :param critic_reduction: how the critics' expected values become one in the targets: "mean" or "min". The policy
        follows their mean.
    :param target_update_interval: update the target critics every ``target_update_interval`` gradient steps
    :param exploration_fraction: fraction of entire training period over which the exploration rate is reduced
    :param exploration_initial_eps: initial probability of a uniformly random action
    :param exploration_final_eps: final probability of a uniformly random action; all others follow the softmax policy
    :param action_grid: which actions of a Box are choices: "factored" (``action_bins`` evenly spaced values of each
        dimension, chosen independently), "axis" (zero, and each dimension at either bound) or "joint" (all combinations
        of ``action_bins`` values; for few dimensions)
    :param action_bins: number of values per dimension of a Box, at least 2
    :param critic: "additive": critics with one output per choice, summed over the groups of choices; "joint": critics
        of whole actions, as in SAC, and a network that learns their main effects under the policy, of whose Polyak
        average the stack is made (see :meth:`StaQPolicy.expected_values` and :meth:`StaQPolicy.main_effects_loss`)
    :param reward_scale: factor applied to the rewards in the targets: its ratio to ``ent_coef`` decides how greedy the
        policy is
    :param logit_cache: keep the policy's logits at all stored next states up to date, at the cost of two critics per
        update, instead of evaluating the whole stack in every target: "auto" (wherever it is right, so not with HER,
        VecNormalize or custom weights, and costs less, so not with a short stack and frequent policy updates), True or
        False. It takes 4 bytes per stored transition and choice.
    :param replay_buffer_class: Replay buffer class to use (for instance ``HerReplayBuffer``).
        If ``None``, it will be automatically selected.
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer at a cost of more complexity.
    :param n_steps: When n_step > 1, uses n-step return (with the NStepReplayBuffer) when updating the critics.
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation, see :class:`StaQPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raise ValueError: if an argument is out of range; the message names it, its value and what is accepted
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: StaQPolicy
    memory_size: int
    kl_coef: float | str | Schedule
    ent_coef: float | str | Schedule
    policy_update_interval: int
    critic_reduction: str
    exploration_initial_eps: float
    exploration_final_eps: float
    critic: str

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
        memory_size: int | None = None,
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
        arguments = dict(
            learning_rate=learning_rate,
            batch_size=batch_size,
            tau=tau,
            memory_size=memory_size,
            kl_coef=kl_coef,
            ent_coef=ent_coef,
            policy_update_interval=policy_update_interval,
            critic_reduction=critic_reduction,
            exploration_initial_eps=exploration_initial_eps,
            exploration_final_eps=exploration_final_eps,
            critic=critic,
        )
        # There is no action space yet when a model is loaded, which brings its arguments
        is_box = isinstance(getattr(self, "action_space", None), spaces.Box)
        defaults = FACTORED_BOX_DEFAULTS if is_box and action_grid == "factored" else DEFAULTS
        vars(self).update({name: defaults[name] if value is None else value for name, value in arguments.items()})
        self.logit_rule = logit_rule
        self.target_entropy = target_entropy
        self.n_critics = n_critics
        self.target_update_interval = target_update_interval
        self.exploration_fraction = exploration_fraction
        self.action_grid = action_grid
        self.action_bins = action_bins
        self.reward_scale = reward_scale
        self.logit_cache = logit_cache

        self.exploration_rate = 0.0
        self._n_policy_updates = 0
        self._last_policy_update: int | None = None  # the time step up to which policy updates have been done
        self._logit_cache: LogitCache | None = None
        self._last_logit_sums: th.Tensor | None = None  # at `_last_obs`, if known
        # Called after each policy update with kl_coef, ent_coef, the weights before it and the critics that it deleted;
        # for one call of `learn`: callbacks add theirs in `_on_training_start`
        self.policy_update_hooks: list[PolicyUpdateHook] = []

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        check_arguments(self)
        for name in ("train_freq", "learning_rate", "_stats_window_size", "seed"):  # SB3 takes no NumPy numbers here
            value = getattr(self, name)
            setattr(self, name, value.item() if isinstance(value, np.generic) else value)
        self.logit_rule = make_logit_rule(self.logit_rule, self.memory_size)
        relative_kl_coef = parse_relative(self.kl_coef)
        self._kl_coef_is_relative = relative_kl_coef is not None
        self.kl_coef_schedule = make_schedule("kl_coef", self.kl_coef if relative_kl_coef is None else relative_kl_coef)
        first_ent_coef = parse_auto(self.ent_coef)
        self._ent_coef_is_auto = first_ent_coef is not None
        self.ent_coef_schedule = make_schedule("ent_coef", self.ent_coef if first_ent_coef is None else first_ent_coef)
        target_entropy = self._default_target_entropy() if self.target_entropy == "auto" else self.target_entropy
        self.target_entropy_schedule = make_schedule("target_entropy", target_entropy)
        self.exploration_schedule = LinearSchedule(
            self.exploration_initial_eps, self.exploration_final_eps, self.exploration_fraction
        )
        check_coefficients(self)
        # The stack's arguments belong to the algorithm; the policy only gets to know them
        policy_kwargs = self.policy_kwargs
        self.policy_kwargs = {**policy_kwargs, **{name: getattr(self, name) for name in POLICY_ARGUMENTS}}
        # Policy and replay buffer see the actions as vectors
        action_space = self.action_space
        self.action_space = flatten_action_space(action_space)
        super()._setup_model()
        self.action_space = self.policy.action_space = action_space
        self.policy_kwargs = policy_kwargs
        self._setup_logit_cache()
        if self.verbose >= 1:
            how = "kept in a cache" if self._logit_cache is not None else "evaluated directly through the whole stack"
            print(f"Logits of replayed states are {how}")

    def _default_target_entropy(self) -> Schedule:
        """
        The finer the grid, the larger is the share of the largest entropy that equally spread actions have: what they
        keep is the distance from the uniform policy, ``(1 - share) * log(bins)`` nats per dimension. A coarser grid
        has not so much room, and keeps the share.
        """
        factor = 1.0
        if isinstance(self.action_space, spaces.Box) and self.action_grid != "axis":
            factor = min(1.0, math.log(DEFAULT_TARGET_ENTROPY_BINS) / math.log(self.action_bins))
        start, end = (1.0 - factor * (1.0 - share) for share in DEFAULT_TARGET_ENTROPY)
        return LinearSchedule(start, end, 1.0)

    def _setup_logit_cache(self) -> None:
        """Keep the cache as long as it is right for the replay buffer, else start a new one where one can be used."""
        assert self.replay_buffer is not None
        obstacle = ""
        if not self.policy.frozen_critics.weights.recursive:
            obstacle = f"custom weights, logit_rule={self.logit_rule!r}, which follow no recursion"
        elif not LogitCache.supports(self.replay_buffer) or self._vec_normalize_env is not None:
            normalised = "" if self._vec_normalize_env is None else " and VecNormalize"
            obstacle = f"{type(self.replay_buffer).__name__}{normalised}, whose next states are not known beforehand"
        if self.logit_cache is True and obstacle:
            raise ValueError(f"logit_cache=True cannot be used with {obstacle}; accepted: 'auto' or False")
        pays = self.logit_cache is True or (self.logit_cache == "auto" and self._logit_cache_pays())
        if obstacle or not pays:
            self._logit_cache = None
        elif (
            self._logit_cache is None
            or self._logit_cache.replay_buffer is not self.replay_buffer
            or self._logit_cache.frozen_critics is not self.policy.frozen_critics
        ):
            self._logit_cache = LogitCache(self.replay_buffer, self.policy.frozen_critics, self.device)

    def _logit_cache_pays(self) -> bool:
        """Whether two critics at all stored states cost less per policy update than the stack at all sampled ones."""
        assert isinstance(self.train_freq, TrainFreq)
        if self.logit_rule == "exact" or (self.gradient_steps >= 0 and self.train_freq.unit != TrainFrequencyUnit.STEP):
            return True  # a stack without limit; a number of gradient steps that is not known beforehand
        env_steps = self.train_freq.frequency * self.n_envs
        steps_per_env_step = 1.0 if self.gradient_steps < 0 else self.gradient_steps / env_steps
        n_sampled = steps_per_env_step * self.policy_update_interval * self.batch_size
        return 2 * self.buffer_size <= self.memory_size * n_sampled

    @property
    def _current_ent_coef(self) -> float:
        """In force since the last policy update, so a part of the policy; at first that of the schedule."""
        ent_coef = self.policy.frozen_critics.weights.ent_coef
        return self._coefficients_at(1.0)[1] if ent_coef is None else ent_coef

    def _coefficients_at(self, progress_remaining: float) -> tuple[float, float]:
        """The coefficients ``(kl_coef, ent_coef)`` of the schedules at a progress from 1 (start) to 0 (end)."""
        ent_coef = self.ent_coef_schedule(progress_remaining)
        if self.logit_rule == "weight_corrected":  # it divides by ent_coef
            ent_coef = max(ent_coef, 0.01 * self.ent_coef_schedule(1.0))
        return self._kl_coef_at(progress_remaining, ent_coef), ent_coef

    def _kl_coef_at(self, progress_remaining: float, ent_coef: float) -> float:
        kl_coef = self.kl_coef_schedule(progress_remaining)
        return kl_coef * ent_coef if self._kl_coef_is_relative else kl_coef

    def _next_coefficients(self, q_values: th.Tensor, logit_sums: th.Tensor) -> tuple[float, float]:
        """
        The coefficients ``(kl_coef, ent_coef)`` of the policy update that is due, given what will be pushed and the
        weighted sums before it, both at replayed states.
        """
        progress = max(self._current_progress_remaining, 0.0)  # several environments may overshoot the end a little
        if not self._ent_coef_is_auto:
            return self._coefficients_at(progress)
        # The logits tend to the stack's weighted average over ent_coef: take the value that gives these the entropy
        policy, least_ent_coef = self.policy, MIN_ENT_COEF * self.ent_coef_schedule(1.0)
        ent_coef = max(self._current_ent_coef, least_ent_coef)
        beta = decay_rate(self._kl_coef_at(progress, ent_coef), ent_coef)
        total = PolicyUpdate(beta, deletes=False, deleted_weight=0.0).apply(logit_sums, q_values)
        average = total / (beta * sum(policy.frozen_critics.weights.values) + 1.0)
        ent_coef = solve_ent_coef(
            average,
            policy.action_groups.sizes,
            self.target_entropy_schedule(progress),
            lowest=max(ent_coef / MAX_ENT_COEF_CHANGE, least_ent_coef),
            highest=ent_coef * MAX_ENT_COEF_CHANGE,
        )
        return self._kl_coef_at(progress, ent_coef), ent_coef

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Alternate policy evaluation and policy updates: as many updates as are due, spread over the gradient steps. They
        are due by the environment steps that ``learn`` has taken: without any, the critics of the current policy are
        trained.

        :param gradient_steps: number of gradient steps
        :param batch_size: transitions per gradient step
        """
        self.policy.set_training_mode(True)
        self._setup_logit_cache()
        # Update learning rate according to schedule
        self._update_learning_rate(self.policy.optimizer)

        n_updates = self._count_due_policy_updates(gradient_steps)
        n_phases = max(n_updates, 1)
        for phase in range(n_phases):
            n_steps = gradient_steps * (phase + 1) // n_phases - gradient_steps * phase // n_phases
            self._evaluate_policy(n_steps, batch_size)
            if n_updates > 0:
                self._update_policy(batch_size)

    def _count_due_policy_updates(self, gradient_steps: int) -> int:
        """How many multiples of ``policy_update_interval`` have passed, at most one per gradient step."""
        if self._last_policy_update is None:
            self._last_policy_update = max(self.learning_starts, self._num_timesteps_at_start)
        due = max(self.num_timesteps - self._last_policy_update, 0) // self.policy_update_interval
        self._last_policy_update += due * self.policy_update_interval
        return min(due, gradient_steps)

    def _evaluate_policy(self, gradient_steps: int, batch_size: int) -> None:
        """Train the critics towards the soft Q-function of the current policy."""
        policy = self.policy
        statistics: dict[str, list[th.Tensor]] = defaultdict(list)
        for batch, log_pi, drawn in self._batches(gradient_steps, batch_size):
            discounts = batch.discounts if batch.discounts is not None else self.gamma
            with th.no_grad():
                # y = r + gamma V(s'),  V(s') = E_{a~pi}[Q(s',a)] + ent_coef * H(pi(.|s'))
                next_q_values, sweep = policy.expected_values(batch.next_observations, log_pi, drawn)
                next_values = soft_value(log_pi, next_q_values, self._current_ent_coef).unsqueeze(1)
                targets = self.reward_scale * batch.rewards + (1 - batch.dones) * discounts * next_values

            td_error = policy.action_values(batch.observations, batch.actions) - targets.squeeze(1)
            # Each critic has its own regression: mean over the batch, sum over the critics
            loss = td_error.square().mean(dim=1).sum()
            statistics["critic_loss"].append(loss.detach())
            statistics["td_error"].append(td_error.detach().abs().mean())
            if sweep is not None:
                main_effects_loss = policy.main_effects_loss(sweep)
                statistics["main_effects_loss"].append(main_effects_loss.detach())
                loss = loss + main_effects_loss

            policy.optimizer.zero_grad()
            loss.backward()
            policy.optimizer.step()

            self._n_updates += 1
            if self._n_updates % self.target_update_interval == 0:
                policy.update_targets(self.tau)

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if statistics:
            # The only transfer to the host: a GPU would have to wait for one in each gradient step
            means = th.stack([th.stack(values).mean() for values in statistics.values()]).tolist()
            for name, mean in zip(statistics, means, strict=True):
                self._check_critics(name, mean)
                self.logger.record(f"train/{name}", mean)

    def _update_policy(self, batch_size: int) -> None:
        """``xi_{k+1} = scale * (beta S_k + Q_k - w Q_{k-M})``: freeze a copy of the critics on top of the stack."""
        policy = self.policy
        batch, cache_index = self._sample(max(batch_size, MIN_UPDATE_STATES))
        old_logit_sums = self._next_logit_sums(batch, cache_index)
        old_log_pi = self._log_policy(old_logit_sums)
        q_values = policy.q_values(policy.additive_critics, batch.next_observations)
        self._check_critics("mean Q-value", q_values.mean().item())
        kl_coef, ent_coef = self._next_coefficients(q_values, old_logit_sums)
        old_weights = copy.copy(policy.frozen_critics.weights)

        update, deleted = policy.push_critics(kl_coef, ent_coef)
        self._n_policy_updates += 1
        self._last_logit_sums = None
        if self._logit_cache is not None:
            q_newest = partial(policy.q_values, policy.frozen_critics[-1])
            q_deleted = partial(policy.q_values, deleted) if deleted is not None and update.deletes else None
            self._logit_cache.update(update, q_newest, q_deleted)

        log_pi = self._next_log_policy(batch, cache_index)
        weights = policy.frozen_critics.weights
        max_ent = max_entropy(policy.action_groups.sizes) or 1.0  # a single choice has no entropy
        self.logger.record("train/entropy", entropy(log_pi).mean().item() / max_ent)
        self.logger.record("train/kl_divergence", kl_divergence(log_pi, old_log_pi).mean().item())
        self.logger.record("train/ent_coef", ent_coef)
        self.logger.record("train/kl_coef", kl_coef)
        self.logger.record("train/beta", decay_rate(kl_coef, ent_coef))
        self.logger.record("train/n_frozen_critics", len(policy.frozen_critics))
        self.logger.record("train/oldest_weight", weights.values[0] if weights.full else 0.0)
        self.logger.record("train/n_policy_updates", self._n_policy_updates, exclude="tensorboard")
        for hook in self.policy_update_hooks:
            hook(kl_coef, ent_coef, old_weights, deleted)

    def _check_critics(self, what: str, value: float) -> None:
        """Stop before critics that are not finite are trained on, or get into the policy."""
        if not np.isfinite(value):
            raise ValueError(
                f"The critics have diverged: {what} is {value} after {self._n_updates} gradient steps with "
                f"learning_rate={self.learning_rate!r} and reward_scale={self.reward_scale!r}; smaller values are more "
                "stable. The policy is still that of the last update."
            )

    def _batches(
        self, n_batches: int, batch_size: int
    ) -> Iterator[tuple[ReplayBufferSamples, th.Tensor, DrawnActions | None]]:
        """
        Batches of transitions, ``log pi(.|s')`` at their next states and, for joint critics, actions drawn from that.
        The policy is fixed between its updates, so several batches are drawn and evaluated at once; but not from
        buffers whose samples may be no set of equals (HER's end with the relabelled transitions).
        """
        assert self.replay_buffer is not None
        draw = self.policy.draw_actions if self.critic == "joint" else None
        if not LogitCache.supports(self.replay_buffer):
            for _ in range(n_batches):
                samples, _ = self._sample(batch_size)
                log_pi = self._next_log_policy(samples, None)
                yield samples, log_pi, draw(log_pi) if draw is not None else None
            return
        n_at_once = max(1, MIN_UPDATE_STATES // batch_size)
        for first in range(0, n_batches, n_at_once):
            samples, cache_index = self._sample(min(n_at_once, n_batches - first) * batch_size)
            log_pi = self._next_log_policy(samples, cache_index)
            drawn = draw(log_pi).split(int(batch_size)) if draw is not None else repeat(None)
            yield from zip(split_samples(samples, batch_size), log_pi.split(int(batch_size)), drawn, strict=False)

    def _sample(self, batch_size: int) -> tuple[ReplayBufferSamples, Any]:
        """A batch of transitions, and where the logit cache has its next states (None without a cache)."""
        assert self.replay_buffer is not None
        if self._logit_cache is None:
            return self.replay_buffer.sample(batch_size, env=self._vec_normalize_env), None
        self._logit_cache.sync(self.policy.logit_sums)
        return self._logit_cache.sample(batch_size)

    def _next_log_policy(self, batch: ReplayBufferSamples, cache_index: Any) -> th.Tensor:
        """``log pi(.|s')`` at the next states of a batch from :meth:`_sample`, shape (batch, n_choices)."""
        return self._log_policy(self._next_logit_sums(batch, cache_index))

    def _log_policy(self, logit_sums: th.Tensor) -> th.Tensor:
        return log_policy(self.policy.scale(logit_sums), self.policy.action_groups.sizes)

    def _next_logit_sums(self, batch: ReplayBufferSamples, cache_index: Any) -> th.Tensor:
        if self._logit_cache is None:
            return self.policy.logit_sums(batch.next_observations)
        return self._logit_cache.sums_at(cache_index)

    def _on_step(self) -> None:
        self.exploration_rate = self.exploration_schedule(self._current_progress_remaining)
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Overrides the base_class predict function to include exploration: uniformly random actions with probability
        ``exploration_rate``, unless deterministic. ``model.policy.predict`` is without.

        :param observation: the input observation
        :param state: The last states (can be None, used in recurrent policies)
        :param episode_start: The last masks (can be None, used in recurrent policies)
        :param deterministic: Whether to return the most probable actions, or the mean ones where a Box is factored,
            instead of sampled ones
        :return: the model's action and the next state (used in recurrent policies)
        """
        actions, state = self.policy.predict(observation, state, episode_start, deterministic)
        is_vectorized = self.policy.is_vectorized_observation(observation)
        actions = actions.reshape(-1, *self.action_space.shape)  # type: ignore[misc]
        if not deterministic:
            actions = self._explore(actions)
        return actions if is_vectorized else actions.squeeze(axis=0), state

    def _explore(self, actions: np.ndarray) -> np.ndarray:
        """Replace each of a batch of actions by a uniformly random one with probability ``exploration_rate``."""
        explores = np.random.rand(len(actions)) < self.exploration_rate
        if explores.any():
            actions[explores] = self._to_env_actions(self.policy.action_groups.uniform(int(explores.sum())))
        return actions

    def _to_env_actions(self, choices: th.Tensor) -> np.ndarray:
        """Choices, shape (batch, number of groups), as actions, shape (batch, *action_space.shape)."""
        stored = self.policy.action_groups.decode(choices).cpu().numpy()
        actions = stored.reshape(-1, *self.action_space.shape).astype(self.action_space.dtype)  # type: ignore[misc]
        return self.policy.unscale_action(actions) if isinstance(self.action_space, spaces.Box) else actions

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        assert self._last_obs is not None
        groups = self.policy.action_groups
        if self.num_timesteps < learning_starts:  # random choices, not random actions: a Box has actions off the grid
            actions = self._to_env_actions(groups.uniform(n_envs))
        elif (logit_sums := self._known_logit_sums()) is None:
            actions, _ = self.predict(self._last_obs)
        else:
            choices = groups.sample(self._log_policy(logit_sums))
            actions = self._explore(self._to_env_actions(choices))
        is_box = isinstance(self.action_space, spaces.Box)
        return actions, self.policy.scale_action(actions) if is_box else actions

    def _known_logit_sums(self) -> th.Tensor | None:
        """
        The sums at the last observations, where the cache has just evaluated the current stack there; None where a
        subclass has its own way to act.
        """
        if self._last_logit_sums is None or self._logit_cache is None or not self._logit_cache.in_sync:
            return None
        own_ways = [getattr(type(self.policy), name) is getattr(StaQPolicy, name) for name in ("_predict", "logits")]
        return self._last_logit_sums if type(self).predict is StaQ.predict and all(own_ways) else None

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        if self._vec_normalize_env is not None:  # it clips: look at what the environments returned
            self._check_finite("reward", self._vec_normalize_env.get_original_reward())
            self._check_finite("observation", self._vec_normalize_env.get_original_obs())
        else:
            self._check_finite("reward", reward)
            self._check_finite("observation", new_obs)
        for i in np.flatnonzero(dones):
            self._check_finite("observation", infos[i].get("terminal_observation", ()), int(i))
        if self._logit_cache is not None:
            self._logit_cache.sync(self.policy.logit_sums)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        self._last_logit_sums = None
        if self._logit_cache is not None and self._logit_cache.replay_buffer is replay_buffer:
            next_logit_sums = self._logit_cache.append(self.policy.logit_sums)
            if not dones.any():  # else new episodes have started
                self._last_logit_sums = next_logit_sums

    def _check_finite(
        self, what: str, values: np.ndarray | dict[str, np.ndarray], env_index: int | None = None
    ) -> None:
        """
        Stop before a non-finite number gets into the replay buffer or the critics.

        :param what: what it is, for the error message
        :param values: of all environments, or of one
        :param env_index: the environment, if they are of one
        """
        for key, array in values.items() if isinstance(values, dict) else [("", values)]:
            array = np.asarray(array)
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                if env_index is None:
                    env_index = int(np.argmin(np.isfinite(array.reshape(len(array), -1)).all(axis=1)))
                    array = array[env_index]
                raise ValueError(
                    f"Environment {env_index} returned a non-finite {what}{f' {key!r}' if key else ''} at step "
                    f"{self.num_timesteps}: {array}; accepted: finite numbers. "
                    "Nothing of this step was stored: the model can be saved."
                )

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        total_timesteps, callback = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        assert self._last_obs is not None
        self._check_finite("observation", self._last_obs)
        if reset_num_timesteps:
            self._last_policy_update = None
        self._last_logit_sums = None
        self._setup_logit_cache()
        return total_timesteps, callback

    def learn(
        self: SelfStaQ,
        total_timesteps: int | float,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str = "StaQ",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfStaQ:
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
            self.policy_update_hooks = []

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file. An existing file is replaced once
        the new one is complete.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        left_out = {*self._excluded_save_params(), *DERIVED, *(exclude or ())} - {*(include or ())}
        with atomic_write(path, "zip") as file:
            archive = io.BytesIO()  # a pipe, or a file open for writing only, cannot be added to
            super().save(archive, exclude, include)
            add_arguments(archive, {name: value for name, value in vars(self).items() if name not in left_out})
            file.write(archive.getbuffer())

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfStaQ],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        weights_only: bool = False,
        **kwargs: Any,
    ) -> SelfStaQ:
        with open_archive(path, "zip") as file:
            check_algorithm(file, "StaQ", ("memory_size", "policy_update_interval"))
            if weights_only:
                given = {**(custom_objects or {}), **kwargs}
                file, custom_objects = without_pickles(file, given, cls.policy_aliases.values())
            return super().load(file, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        assert self.replay_buffer is not None
        save_buffer(path, self.replay_buffer)

    def load_replay_buffer(
        self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True, mmap: bool = False
    ) -> None:
        assert self.replay_buffer is not None
        buffer, _ = load_buffer(path, mmap)
        check_buffer(buffer, self.replay_buffer)
        if isinstance(buffer, HerReplayBuffer):
            assert self.env is not None, "You must pass an environment at load time when using `HerReplayBuffer`"
            buffer.set_env(self.env)
            if truncate_last_traj:
                buffer.truncate_last_trajectory()
        buffer.device = self.device
        self.replay_buffer = buffer

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_logit_cache", "_last_logit_sums", "policy_update_hooks"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in self.policy_aliases:
            raise ValueError(f"policy={policy_name!r} is unknown; accepted: {', '.join(self.policy_aliases)}")
        return self.policy_aliases[policy_name]
