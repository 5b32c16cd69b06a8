"""The policy of StaQ: softmax of the weighted sum of frozen critics, with the online critics that will join them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import ConstantSchedule
from torch import nn

from sb3_staq.action_spaces import make_branches
from sb3_staq.base_policy import CriticPolicy
from sb3_staq.main_effects import StateActionCritics
from sb3_staq.mirror_descent import LogitRule, PolicyUpdate, log_policy, make_logit_rule
from sb3_staq.observations import in_parts
from sb3_staq.q_networks import Critic, CriticEnsemble, QNetwork
from sb3_staq.q_stack import FrozenCritics

# What replaces the weighted sums of the delivered policy in `acting_by`. Only in the thread that collects: others may
# call `predict` meanwhile
_ACTING_SUMS: ContextVar[Callable[[PyTorchObs], th.Tensor] | None] = ContextVar("acting_sums", default=None)
CRITICS = ("additive", "joint")
EVAL_POLICIES = ("average", "best", "last")
# Arguments of the algorithm that determine the shapes of the networks
SHAPE_ARGUMENTS = ("n_critics", "action_grid", "action_bins", "critic")
# Arguments of the algorithm that belong to the policy
POLICY_ARGUMENTS = (
    "n_critics",
    "critic_reduction",
    "memory_size",
    "logit_rule",
    "action_grid",
    "action_bins",
    "critic",
    "eval_policy",
    "average_window",
    "average_size",
)


class StaQPolicy(CriticPolicy):
    """
    Policy class of StaQ: ``pi(.|s) = softmax(scale * sum_i w_i Q_i(s))`` over the stack of frozen critics.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Schedule of the learning rate
    :param net_arch: Sizes of the hidden layers of each critic, [256, 256] by default ([] after a ``NatureCNN``). For
        state-action critics also ``dict(pi=[...], qf=[...])`` as in SAC, ``pi`` ([128, 128] by default, [] after a
        ``NatureCNN``) for the main effects that the stack is made of and ``qf`` ([256, 256] by default) for the critics
    :param activation_fn: Activation function
    :param layer_norm: Whether the critics' hidden layers are normalised before their activations; by default only those
        of state-action critics are (the network of main effects never is)
    :param features_extractor_class: Class of the features extractors, of which each critic has its own. The default
        depends on the policy class (``FlattenExtractor``, ``NatureCNN`` or ``CombinedExtractor``)
    :param features_extractor_kwargs: Keyword arguments of the features extractors
    :param normalize_images: Whether to divide images by 255.0
    :param optimizer_class: Class of the optimizer, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Keyword arguments of the optimizer apart from the learning rate (``fused=True`` by default
        for Adam)

    The other parameters are those of :class:`~sb3_staq.staq.StaQ`, which sets them.
    """

    default_features_extractor_class: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        layer_norm: bool | None = None,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        critic_reduction: str = "mean",
        memory_size: int = 50,
        logit_rule: LogitRule = "weight_corrected",
        action_grid: str = "factored",
        action_bins: int = 5,
        critic: str = "additive",
        eval_policy: str = "average",
        average_window: float = 0.15,
        average_size: int = 60,
    ):
        if optimizer_kwargs is None:
            # The same results, in one kernel instead of several per parameter
            optimizer_kwargs = {"fused": True} if optimizer_class is th.optim.Adam else {}
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class or self.default_features_extractor_class,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            normalize_images=normalize_images,
            squash_output=isinstance(action_space, spaces.Box),  # `predict` rescales from [-1, 1]
        )
        if net_arch is None:
            is_cnn = self.features_extractor_class == NatureCNN  # it ends in a hidden layer
            net_arch = [] if is_cnn else [256, 256]
            if critic == "joint":
                net_arch = dict(pi=[] if is_cnn else [128, 128], qf=[256, 256])
        self.net_arch = net_arch
        self.activation_fn = activation_fn
        self.layer_norm = critic == "joint" if layer_norm is None else layer_norm
        self.n_critics = n_critics
        self.critic_reduction = critic_reduction
        self.memory_size = memory_size
        self.logit_rule = make_logit_rule(logit_rule, memory_size)  # a callable becomes numbers, to be saved
        self.action_grid = action_grid
        self.action_bins = action_bins
        self.n_obs_elements = get_flattened_obs_dim(observation_space)
        self.branches = make_branches(action_space, action_grid, action_bins)
        self.critic = critic
        self.eval_policy = eval_policy
        self.average_window = average_window
        self.average_size = average_size

        critics: CriticEnsemble | StateActionCritics
        main_effects: CriticEnsemble | None = None
        if critic == "joint":
            critics = StateActionCritics([self._make_state_action_critic() for _ in range(n_critics)])
            template = main_effects = CriticEnsemble([self._make_critic(dueling=False, layer_norm=False)])
        else:
            dueling = len(self.branches.sizes) > 1
            critics = template = CriticEnsemble([self._make_critic(dueling, self.layer_norm) for _ in range(n_critics)])
        # First, so that a saved stack that is too large is refused before anything is overwritten
        self.frozen_critics = FrozenCritics(template, self.logit_rule, memory_size, average_window, average_size)
        self.main_effects = main_effects
        self.critics = critics
        self.critics_target = critics.frozen_copy()
        self.main_effects_target = None if main_effects is None else main_effects.frozen_copy()
        self.set_training_mode(False)
        trained: list[nn.Module] = [critics] if main_effects is None else [critics, main_effects]
        self.optimizer = self.optimizer_class(  # type: ignore[call-arg]
            [param for module in trained for param in module.parameters()],
            lr=lr_schedule(1),
            **self.optimizer_kwargs,
        )

    def _make_critic(self, dueling: bool, layer_norm: bool) -> QNetwork:
        net_arch, _ = get_actor_critic_arch(self.net_arch)
        extractor, sizes = self.make_features_extractor(), self.branches.sizes
        return QNetwork(extractor, sizes, net_arch, self.activation_fn, dueling, layer_norm)

    def _make_state_action_critic(self) -> Critic:
        _, net_arch = get_actor_critic_arch(self.net_arch)
        extractor = self.make_features_extractor()
        n_inputs = extractor.features_dim + self.branches.n_inputs
        return Critic(extractor, n_inputs, 1, net_arch, self.activation_fn, self.layer_norm)

    # Acting

    @property
    def eval_policy(self) -> str:
        """The delivered policy: "average", "best" or "last"."""
        return self._eval_policy

    @eval_policy.setter
    def eval_policy(self, eval_policy: str) -> None:
        if eval_policy not in EVAL_POLICIES:
            raise ValueError(f"Invalid eval_policy={eval_policy!r}: expected {' or '.join(map(repr, EVAL_POLICIES))}")
        self._eval_policy = eval_policy

    def logit_sums(self, obs: PyTorchObs, weighting: str = "last") -> th.Tensor:
        """
        Compute the weighted sum ``S`` of the frozen critics.

        :param weighting: whose sum: "last", "average" or "best", see ``eval_policy``; or "candidate"
        :return: shape (batch, n_bins); differentiable with respect to the observations
        """
        return in_parts(lambda part: self.frozen_critics(self.preprocess(part), weighting), obs, self.n_obs_elements)

    def log_prob(self, logit_sums: th.Tensor) -> th.Tensor:
        """
        Compute ``log pi(.|s)``, where ``pi = softmax(xi)`` and ``xi = scale * S``.

        :param logit_sums: weighted sums ``S``, shape (batch, n_bins)
        :return: same shape
        """
        return log_policy(self.frozen_critics.weights.scale * logit_sums, self.branches.sizes)

    @contextmanager
    def acting_by(self, logit_sums: Callable[[PyTorchObs], th.Tensor]) -> Iterator[None]:
        """
        Let :meth:`logits`, and so ``predict``, use other weighted sums inside the block.

        :param logit_sums: computes them from observations, shape (batch, n_bins)
        """
        token = _ACTING_SUMS.set(logit_sums)
        try:
            yield
        finally:
            _ACTING_SUMS.reset(token)

    def logits(self, obs: PyTorchObs) -> th.Tensor:
        """
        Compute the logits of the delivered policy, see ``eval_policy``.

        :return: shape (batch, n_bins); differentiable with respect to the observations
        """
        acting_sums = _ACTING_SUMS.get()
        sums = self.logit_sums(obs, self.eval_policy) if acting_sums is None else acting_sums(obs)
        return self.frozen_critics.weights.scale * sums

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        """Return the distribution over bins of the delivered policy, see ``eval_policy``."""
        return self.branches.distribution(self.logits(obs))

    def forward(self, obs: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        """Return stored actions of the delivered policy."""
        return self._predict(obs, deterministic=deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        logits, branches = self.logits(observation), self.branches
        if deterministic:
            return branches.deterministic(logits)
        return branches.decode(branches.sample(log_policy(logits, branches.sizes)))

    def random_actions(self, n_actions: int) -> np.ndarray:
        """
        Draw actions of uniformly random bins, the only actions of a Box that the policy samples.

        :return: actions of the environment, shape (n_actions, ...)
        """
        bins = self.branches.uniform(n_actions)
        actions = self.branches.decode(bins).cpu().numpy().reshape(-1, *self.action_space.shape)  # type: ignore[misc]
        actions = actions.astype(self.action_space.dtype)
        return self.unscale_action(actions)

    def push_critics(
        self, kl_coef: float, ent_coef: float, memory_size: int | None = None
    ) -> tuple[PolicyUpdate, list[CriticEnsemble]]:
        """
        Update the policy: see :meth:`sb3_staq.q_stack.FrozenCritics.push`, which gives the result.

        :param memory_size: the largest number of critics from now on, if it changes
        """
        if memory_size is not None:
            self.memory_size = self.frozen_critics.weights.memory_size = memory_size
        return self.frozen_critics.push(self.additive_critics, kl_coef, ent_coef)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(
            super()._get_constructor_parameters(),
            net_arch=self.net_arch,
            activation_fn=self.activation_fn,
            layer_norm=self.layer_norm,
            lr_schedule=ConstantSchedule(0.0),  # not needed for loading the policy alone
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            **{name: getattr(self, name) for name in POLICY_ARGUMENTS},
        )


MlpPolicy = StaQPolicy


class CnnPolicy(StaQPolicy):
    """``StaQPolicy`` for image observations: ``NatureCNN`` by default."""

    default_features_extractor_class = NatureCNN


class MultiInputPolicy(StaQPolicy):
    """``StaQPolicy`` for Dict observations: ``CombinedExtractor`` by default."""

    default_features_extractor_class = CombinedExtractor
