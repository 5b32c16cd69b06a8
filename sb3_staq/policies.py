"""The policy of StaQ: softmax of the weighted sum of frozen critics, with the online critics that will join them."""

import io
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import ConstantSchedule, get_device
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sb3_staq.action_spaces import Branches, make_branches
from sb3_staq.main_effects import (
    SampledActions,
    StateActionCritics,
    StateActionQNetwork,
    Sweep,
    expected_q_values,
)
from sb3_staq.mirror_descent import LogitRule, PolicyUpdate, expected_value, log_policy, make_logit_rule
from sb3_staq.observations import in_parts
from sb3_staq.plain_data import load_policy, save_policy
from sb3_staq.q_networks import CriticEnsemble, QNetwork
from sb3_staq.q_stack import FrozenCritics

SelfStaQPolicy = TypeVar("SelfStaQPolicy", bound="StaQPolicy")

CRITICS = ("additive", "joint")
EVAL_POLICIES = ("average", "last")
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
CRITIC_REDUCTIONS: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "mean": partial(th.mean, dim=0),
    "min": partial(th.amin, dim=0),
}


class StaQPolicy(BasePolicy):
    """
    Policy class of StaQ: ``pi(.|s) = softmax(scale * sum_i w_i Q_i(s))`` over the stack of frozen critics.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: Sizes of the hidden layers of each critic, [256, 256] by default ([] after a ``NatureCNN``). For
        state-action critics also ``dict(pi=[...], qf=[...])`` as in SAC, ``pi`` ([128, 128] by default, [] after a
        ``NatureCNN``) for the main effects that the stack is made of and ``qf`` ([256, 256] by default) for the critics
    :param activation_fn: Activation function
    :param layer_norm: Whether the critics' hidden layers are normalised before their activations; by default those of
        state-action critics are (the network of main effects never is)
    :param features_extractor_class: Features extractor to use; each critic has its own. By default the one of the
        class (``FlattenExtractor``, ``NatureCNN`` or ``CombinedExtractor``)
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor
    :param normalize_images: Whether to divide images by 255.0
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer
        (``fused=True`` by default for Adam)

    The other parameters are those of :class:`~sb3_staq.staq.StaQ`, which sets them.
    """

    default_features_extractor_class: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor
    branches: Branches

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
            # The same numbers in one kernel instead of several per parameter
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
        self.logit_rule = make_logit_rule(logit_rule, memory_size)  # numbers, which can be saved
        self.action_grid = action_grid
        self.action_bins = action_bins
        self.branches = make_branches(action_space, action_grid, action_bins)
        self.critic = critic
        self.eval_policy = eval_policy
        self._acting_sums: Callable[[PyTorchObs], th.Tensor] | None = None
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

    def _make_state_action_critic(self) -> StateActionQNetwork:
        _, net_arch = get_actor_critic_arch(self.net_arch)
        extractor, n_inputs = self.make_features_extractor(), self.branches.n_inputs
        return StateActionQNetwork(extractor, n_inputs, net_arch, self.activation_fn, self.layer_norm)

    # Acting

    def preprocess(self, obs: PyTorchObs) -> PyTorchObs:
        """
        Make the critics' input of observations.

        :param obs: observations as environments and replay buffers give them (images channel-first)
        :return: floats, images scaled, discrete observations one-hot encoded
        """
        return preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images)  # type: ignore[return-value]

    def obs_to_tensor(self, observation: Any) -> tuple[PyTorchObs, bool]:
        """As SB3's, but of nested lists also where they are images."""
        if isinstance(observation, dict):
            return super().obs_to_tensor({key: np.asarray(value) for key, value in observation.items()})
        return super().obs_to_tensor(np.asarray(observation))

    def logit_sums(self, obs: PyTorchObs, average: bool = False) -> th.Tensor:
        """
        Compute the weighted sum ``S`` of the frozen critics.

        :param obs: observations
        :param average: that of the average policy, instead of the last
        :return: shape (batch, n_bins); differentiable with respect to the observations
        """
        return in_parts(lambda part: self.frozen_critics(self.preprocess(part), average), obs)

    def log_prob(self, logit_sums: th.Tensor) -> th.Tensor:
        """
        Compute ``log pi(.|s)``, ``pi = softmax(xi)`` and ``xi = scale * S``.

        :param logit_sums: weighted sums ``S``, shape (batch, n_bins)
        :return: same shape
        """
        return log_policy(self.frozen_critics.weights.scale * logit_sums, self.branches.sizes)

    @contextmanager
    def acting_by(self, logit_sums: Callable[[PyTorchObs], th.Tensor]) -> Iterator[None]:
        """
        Let :meth:`logits`, and so ``predict``, follow other weighted sums for a while.

        :param logit_sums: gives them for observations, shape (batch, n_bins)
        """
        self._acting_sums = logit_sums
        try:
            yield
        finally:
            self._acting_sums = None

    def logits(self, obs: PyTorchObs) -> th.Tensor:
        """
        Compute the logits of the policy that is delivered, see ``eval_policy``.

        :param obs: observations
        :return: shape (batch, n_bins); differentiable with respect to the observations
        """
        if self._acting_sums is not None:
            sums = self._acting_sums(obs)
        else:
            sums = self.logit_sums(obs, average=self.eval_policy == "average")
        return self.frozen_critics.weights.scale * sums

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        """
        Give the policy that is delivered, see ``eval_policy``.

        :param obs: observations
        :return: a distribution over bins
        """
        return self.branches.distribution(self.logits(obs))

    def forward(self, obs: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        return self._predict(obs, deterministic=deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        logits, branches = self.logits(observation), self.branches
        if deterministic:
            return branches.deterministic(logits)
        return branches.decode(branches.sample(log_policy(logits, branches.sizes)))

    def random_actions(self, n_actions: int) -> np.ndarray:
        """
        Draw actions of uniformly random bins. A Box has others as well, which the policy never takes.

        :param n_actions: number of actions
        :return: actions of the environment, shape (n_actions, ...)
        """
        bins = self.branches.uniform(n_actions)
        actions = self.branches.decode(bins).cpu().numpy().reshape(-1, *self.action_space.shape)  # type: ignore[misc]
        actions = actions.astype(self.action_space.dtype)
        return self.unscale_action(actions) if isinstance(self.action_space, spaces.Box) else actions

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """
        Scale actions of a Box as they are stored: from [low, high] to [-1, 1], -1 where the bounds are equal.

        :param action: actions
        :return: stored actions
        """
        low, high = self.action_space.low, self.action_space.high  # type: ignore[attr-defined]
        return 2.0 * ((action - low) / np.where(high > low, high - low, 1.0)) - 1.0

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        Scale stored actions of a Box to its bounds, where rounding errors are cut off.

        :param scaled_action: stored actions
        :return: actions
        """
        bounds = self.action_space.low, self.action_space.high  # type: ignore[attr-defined]
        return np.clip(super().unscale_action(scaled_action), *bounds)

    # Learning

    @property
    def additive_critics(self) -> CriticEnsemble:
        """
        What a policy update pushes on the stack: the critics, or the Polyak average of the main effects.

        Main effects are small beside the values that they are learnt from: successive policies would differ by the
        noise of the gradient steps.
        """
        critics = self.critics if self.main_effects_target is None else self.main_effects_target
        assert isinstance(critics, CriticEnsemble)
        return critics

    def push_critics(
        self, kl_coef: float, ent_coef: float, memory_size: int | None = None
    ) -> tuple[PolicyUpdate, list[CriticEnsemble]]:
        """
        Update the policy: see :meth:`sb3_staq.q_stack.FrozenCritics.push`.

        :param kl_coef: weight of the KL term
        :param ent_coef: weight of the entropy term
        :param memory_size: the number of critics from now on, if it changes
        :return: what this does to the weighted sum, and the critics that it deletes from it
        """
        if memory_size is not None:
            self.memory_size = self.frozen_critics.weights.memory_size = memory_size
        return self.frozen_critics.push(self.additive_critics, kl_coef, ent_coef)

    @th.no_grad()
    def q_values(self, critics: CriticEnsemble, obs: PyTorchObs) -> th.Tensor:
        """
        Compute the Q-values of an ensemble.

        :param critics: targets, an entry of the stack, ...
        :param obs: observations
        :return: mean of its members, shape (batch, n_bins)
        """
        with th.autocast(self.device.type, enabled=False):  # the policy keeps its precision
            return in_parts(lambda part: critics.q_values(self.preprocess(part)), obs)

    def action_values(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        Compute the Q-values of stored actions by the critics that are trained.

        :param obs: observations
        :param actions: stored actions, shape (batch, action_dim)
        :return: shape (n_critics, batch)
        """
        obs, branches = self.preprocess(obs), self.branches
        if isinstance(self.critics, StateActionCritics):
            return self.critics(obs, branches.inputs(actions))
        q_values = self.critics(obs)
        chosen = branches.columns(branches.encode(actions)).expand(len(q_values), -1, -1)
        return q_values.gather(2, chosen).sum(dim=2)

    @th.no_grad()
    def expected_q(
        self, obs: PyTorchObs, log_prob: th.Tensor, actions: SampledActions | None
    ) -> tuple[th.Tensor, Sweep | None]:
        """
        Compute ``E_{a~pi}[Q(s,a)]`` by the target critics, reduced to one.

        :param obs: observations
        :param log_prob: the policy there, shape (batch, n_bins)
        :param actions: drawn from it, for state-action critics
        :return: the expectation, shape (batch,): exact for additive critics; and what state-action critics, which are
            evaluated at the drawn actions, were swept over
        """
        obs = self.preprocess(obs)
        reduce = CRITIC_REDUCTIONS[self.critic_reduction]
        if isinstance(self.critics_target, StateActionCritics):
            assert actions is not None
            expected, sweep = expected_q_values(self.critics_target, obs, actions, len(self.branches.sizes))
            return reduce(expected), sweep
        return reduce(expected_value(log_prob, self.critics_target(obs))), None

    def update_targets(self, tau: float) -> None:
        """
        Move the targets, and the average of the main effects, towards the networks that are trained.

        :param tau: the Polyak coefficient, between 0 and 1
        """
        update = get_ema_multi_avg_fn(1.0 - tau)  # all parameters in one operation
        update(list(self.critics_target.params.values()), list(self.critics.params.values()), None)
        if self.main_effects is not None and self.main_effects_target is not None:
            update(list(self.main_effects_target.params.values()), list(self.main_effects.params.values()), None)

    def set_training_mode(self, mode: bool) -> None:
        """
        Note the mode. It changes nothing.

        Only frozen critics act, and they and the targets stay in evaluation mode, those that are trained in training
        mode; whatever mode is set here, or by ``train()`` and ``eval()``.

        :param mode: as of any SB3 policy
        """
        self.training = mode

    def train(self, mode: bool = True) -> "StaQPolicy":
        """Note the mode, see :meth:`set_training_mode`."""
        self.set_training_mode(mode)
        return self

    # Saving

    def load_from_vector(self, vector: np.ndarray) -> None:
        """
        Load parameters from a 1D vector, as ``parameters_to_vector`` returns them.

        The weights of the stack, which are not parameters, stay as they are.

        :param vector: all parameters, those of the frozen critics included
        """
        super().load_from_vector(vector)
        self.frozen_critics.gather()

    def save(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:  # type: ignore[override]
        """
        Save the policy, the whole stack included. An existing file is replaced once the new one is complete.

        :param path: where to save it
        """
        save_policy(path, self.state_dict(), self._get_constructor_parameters())

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfStaQPolicy],
        path: str | pathlib.Path | io.BufferedIOBase,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        weights_only: bool = False,
    ) -> SelfStaQPolicy:
        """
        Load a policy from a file.

        :param path: the file
        :param device: the device to put it on
        :param custom_objects: arguments of the policy that are taken instead of those of the file
        :param weights_only: for files from others: run nothing of the file, as in ``StaQ.load``
        :return: the policy
        :raise ValueError: if the file is damaged; with ``weights_only`` also if arguments must be given
        """
        state_dict, arguments = load_policy(path, device, custom_objects or {}, weights_only)
        policy = cls(**arguments)
        policy.load_state_dict(state_dict)
        return policy.to(get_device(device))

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
