"""The policy of StaQ: softmax of the weighted sum of frozen critics, with the online critics that will join them."""

import io
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, TypeVar

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

from sb3_staq.action_spaces import make_action_groups
from sb3_staq.critics import CriticEnsemble, FrozenCritics, JointCritics, JointQNetwork, QNetwork
from sb3_staq.mirror_descent import LogitRule, PolicyUpdate, expected_value, log_policy, make_logit_rule
from sb3_staq.plain_json import load_policy, save_policy

SelfPolicy = TypeVar("SelfPolicy", bound="StaQPolicy")

CRITICS = ("additive", "joint")
CRITIC_REDUCTIONS: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "mean": lambda values: values.mean(dim=0),
    "min": lambda values: values.amin(dim=0),
}


class DrawnActions(NamedTuple):
    """Actions drawn from the policy, and the same with one of their groups varied over all its choices."""

    inputs: th.Tensor  # what joint critics take, shape (batch, n_inputs)
    varied_inputs: th.Tensor  # shape (batch, n_varied, n_inputs)
    columns: th.Tensor  # of the varied choices, shape (batch, n_varied)
    valid: th.Tensor  # whether the group has so many choices, same shape
    probabilities: th.Tensor  # of the varied choices, 0 where there is none, same shape

    def split(self, batch_size: int) -> "Iterator[DrawnActions]":
        """
        :param batch_size: number of actions per part
        :return: its parts, views of it
        """
        return map(DrawnActions._make, zip(*(values.split(batch_size) for values in self), strict=True))


class Sweep(NamedTuple):
    """Q-values of actions of which one group is varied over all its choices."""

    obs: PyTorchObs  # preprocessed, of n_swept states
    columns: th.Tensor  # of the varied choices, shape (n_swept, n_varied)
    valid: th.Tensor  # whether the group has so many choices, same shape
    q_values: th.Tensor  # same shape


class StaQPolicy(BasePolicy):
    """
    Policy class of StaQ: ``pi(.|s) = softmax(scale * sum_i w_i Q_i(s))`` over the stack of frozen critics.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: Sizes of the hidden layers of each critic, [256, 256] by default ([] after a ``NatureCNN``). For
        joint critics also ``dict(pi=[...], qf=[...])`` as in SAC, ``pi`` ([128, 128] by default, [] after a
        ``NatureCNN``) for the main effects that the stack is made of and ``qf`` ([256, 256] by default) for the critics
    :param activation_fn: Activation function
    :param layer_norm: Whether the critics' hidden layers are normalised before their activations; by default those of
        joint critics are (the network of main effects never is)
    :param features_extractor_class: Features extractor to use; each critic has its own. By default the one of the
        class (``FlattenExtractor``, ``NatureCNN`` or ``CombinedExtractor``)
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor
    :param normalize_images: Whether to divide images by 255.0
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer
        (``fused=True`` by default for Adam)
    :param n_critics: Number of critics that are trained
    :param critic_reduction: How the critics' expected values become one in targets, "mean" or "min"
    :param memory_size: The largest number of frozen ensembles
    :param logit_rule: "weight_corrected", "truncated", "exact" or custom weights by age, see
        :func:`sb3_staq.mirror_descent.make_logit_rule`
    :param action_grid: which actions of a Box are choices, see :func:`sb3_staq.action_spaces.make_action_groups`
    :param action_bins: number of values per dimension of a Box
    :param critic: "additive" or "joint", see :class:`sb3_staq.staq.StaQ`
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
        self.action_groups = make_action_groups(action_space, action_grid, action_bins)

        self.critic = critic

        critics: CriticEnsemble | JointCritics
        main_effects: CriticEnsemble | None = None
        if critic == "joint":
            critics = JointCritics([self._make_joint_critic() for _ in range(n_critics)])
            template = main_effects = CriticEnsemble([self._make_critic(dueling=False, layer_norm=False)])
        else:
            dueling = len(self.action_groups.sizes) > 1
            critics = template = CriticEnsemble([self._make_critic(dueling, self.layer_norm) for _ in range(n_critics)])
        # First, so that a saved stack that is too large is refused before anything is overwritten
        self.frozen_critics = FrozenCritics(template, self.logit_rule, memory_size)
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
        extractor, sizes = self.make_features_extractor(), self.action_groups.sizes
        return QNetwork(extractor, sizes, net_arch, self.activation_fn, dueling, layer_norm)

    def _make_joint_critic(self) -> JointQNetwork:
        _, net_arch = get_actor_critic_arch(self.net_arch)
        extractor, n_inputs = self.make_features_extractor(), self.action_groups.n_inputs
        return JointQNetwork(extractor, n_inputs, net_arch, self.activation_fn, self.layer_norm)

    @property
    def additive_critics(self) -> CriticEnsemble:
        """
        What a policy update pushes on the stack: the critics, or the Polyak average of the main effects of joint ones.
        These are small beside the values that they are learnt from: successive policies would differ by the noise of
        the gradient steps.
        """
        critics = self.critics if isinstance(self.critics, CriticEnsemble) else self.main_effects_target
        assert critics is not None
        return critics

    def update_targets(self, tau: float) -> None:
        """
        Move the targets, and the average of the main effects, towards the networks that are trained.

        :param tau: the Polyak coefficient, between 0 and 1
        """
        update = get_ema_multi_avg_fn(1.0 - tau)  # all parameters in one operation
        update(list(self.critics_target.params.values()), list(self.critics.params.values()), None)
        if self.main_effects is not None and self.main_effects_target is not None:
            update(list(self.main_effects_target.params.values()), list(self.main_effects.params.values()), None)

    def action_values(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: observations
        :param actions: stored actions, shape (batch, action_dim)
        :return: their Q-values by each of the critics that are trained, shape (n_critics, batch)
        """
        obs, groups = self.preprocess(obs), self.action_groups
        if isinstance(self.critics, JointCritics):
            return self.critics(obs, groups.inputs(actions))
        q_values = self.critics(obs)
        chosen = groups.columns(groups.encode(actions)).expand(len(q_values), -1, -1)
        return q_values.gather(2, chosen).sum(dim=2)

    @th.no_grad()
    def draw_actions(self, log_pi: th.Tensor) -> DrawnActions:
        """
        Actions for the expectations of joint critics. They depend on the policy only, so those of several batches can
        be drawn at once.

        :param log_pi: the policy at some observations, shape (batch, n_choices)
        :return: an action for each
        """
        groups = self.action_groups
        choices = groups.sample(log_pi)
        varied, columns, valid = groups.sweep(choices)
        return DrawnActions(
            inputs=groups.inputs(groups.decode(choices)),
            varied_inputs=groups.inputs(groups.decode(varied.flatten(0, 1))).unflatten(0, columns.shape),
            columns=columns,
            valid=valid,
            probabilities=log_pi.gather(1, columns).exp() * valid,
        )

    @th.no_grad()
    def expected_values(
        self, obs: PyTorchObs, log_pi: th.Tensor, drawn: DrawnActions | None = None
    ) -> tuple[th.Tensor, Sweep | None]:
        """
        ``E_{a~pi}[Q(s,a)]`` by the target critics: exact for additive critics. Joint ones are evaluated at an action
        drawn at each state, and at every other state (all, if there is one group only) one of its groups is swept:
        there the expectation is exact in that group.

        :param obs: observations
        :param log_pi: the policy at these observations, shape (batch, n_choices)
        :param drawn: for joint critics, actions from :meth:`draw_actions`
        :return: the expectation, shape (batch,), the critics reduced to one; and the sweep (None if there was none)
        """
        obs = self.preprocess(obs)
        reduce = CRITIC_REDUCTIONS[self.critic_reduction]
        if not isinstance(self.critics_target, JointCritics):
            return reduce(expected_value(log_pi, self.critics_target(obs))), None
        assert drawn is not None
        # Every other one, not half of the batch: replay buffers like HER's end a batch with transitions of another kind
        swept, sampled = slice(None, None, 2), slice(1, None, 2)
        if len(self.action_groups.sizes) == 1:
            swept, sampled = slice(None), slice(0)
        columns = drawn.columns[swept]
        rows = th.arange(len(log_pi), device=log_pi.device)
        inputs = th.cat([drawn.varied_inputs[swept].flatten(0, 1), drawn.inputs[sampled]])
        rows_of_inputs = th.cat([rows[swept].repeat_interleave(columns.shape[1]), rows[sampled]])
        q_values = self.critics_target(obs, inputs, rows_of_inputs)
        q_swept = q_values[:, : columns.numel()].unflatten(1, columns.shape)
        expected = log_pi.new_empty(len(q_values), len(log_pi))
        expected[:, swept] = (drawn.probabilities[swept] * q_swept).sum(dim=2)
        expected[:, sampled] = q_values[:, columns.numel() :]
        of_swept = {key: x[swept] for key, x in obs.items()} if isinstance(obs, dict) else obs[swept]
        return reduce(expected), Sweep(of_swept, columns, drawn.valid[swept], q_swept.mean(dim=0))

    def main_effects_loss(self, sweep: Sweep) -> th.Tensor:
        """
        Regression of the main effects, ``E[Q(s,a) | a_g]`` over the other groups' choices under the policy. Only
        differences within a group matter to a softmax, so only these are fitted: states of high value do not
        drown them.

        :param sweep: values of varied actions
        :return: mean squared error
        """
        assert self.main_effects is not None
        error = self.main_effects.q_values(sweep.obs).gather(1, sweep.columns) - sweep.q_values
        mean_error = (sweep.valid * error).sum(dim=1, keepdim=True) / sweep.valid.sum(dim=1, keepdim=True)
        return (sweep.valid * (error - mean_error).square()).sum() / sweep.valid.sum()

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """
        :param action: actions of a Box
        :return: what is stored of them: scaled from [low, high] to [-1, 1], -1 where the bounds are equal
        """
        low, high = self.action_space.low, self.action_space.high  # type: ignore[attr-defined]
        return 2.0 * ((action - low) / np.where(high > low, high - low, 1.0)) - 1.0

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        :param scaled_action: stored actions of a Box
        :return: the actions, rounding errors at the bounds cut off
        """
        bounds = self.action_space.low, self.action_space.high  # type: ignore[attr-defined]
        return np.clip(super().unscale_action(scaled_action), *bounds)

    def preprocess(self, obs: PyTorchObs) -> PyTorchObs:
        """
        :param obs: observations as environments and replay buffers give them (images channel-first)
        :return: the critics' input: floats, images scaled, discrete observations one-hot encoded
        """
        return preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images)  # type: ignore[return-value]

    @th.no_grad()
    def logit_sums(self, obs: PyTorchObs) -> th.Tensor:
        """
        The weighted sum ``S`` of the frozen critics.

        :param obs: observations
        :return: shape (batch, n_choices)
        """
        return self.frozen_critics(self.preprocess(obs))

    def scale(self, logit_sums: th.Tensor) -> th.Tensor:
        """``xi = scale * S``: logits from weighted sums, same shape."""
        return self.frozen_critics.weights.scale * logit_sums

    def logits(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observations
        :return: logits of the policy, shape (batch, n_choices)
        """
        return self.scale(self.logit_sums(obs))

    @th.no_grad()
    def q_values(self, critics: CriticEnsemble, obs: PyTorchObs) -> th.Tensor:
        """
        :param critics: an ensemble: targets, an entry of the stack, ...
        :param obs: observations
        :return: Q-values of the choices, shape (batch, n_choices)
        """
        return critics.q_values(self.preprocess(obs))

    def push_critics(self, kl_coef: float, ent_coef: float) -> tuple[PolicyUpdate, CriticEnsemble | None]:
        """The policy update: see :meth:`FrozenCritics.push`."""
        return self.frozen_critics.push(self.additive_critics, kl_coef, ent_coef)

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        """
        :param obs: observations
        :return: the policy at these observations, as a distribution over choices
        """
        return self.action_groups.distribution(self.logits(obs))

    def forward(self, obs: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        return self._predict(obs, deterministic=deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        logits, groups = self.logits(observation), self.action_groups
        if deterministic:
            return groups.deterministic(logits)
        return groups.decode(groups.sample(log_policy(logits, groups.sizes)))

    def load_from_vector(self, vector: np.ndarray) -> None:
        """
        Load parameters from a 1D vector, as ``parameters_to_vector`` returns them. The weights of the stack, which are
        not parameters, stay as they are.

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
        cls: type[SelfPolicy],
        path: str | pathlib.Path | io.BufferedIOBase,
        device: th.device | str = "auto",
        weights_only: bool = False,
        **kwargs: Any,
    ) -> SelfPolicy:
        state_dict, arguments = load_policy(path, device, weights_only, kwargs)
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
            n_critics=self.n_critics,
            critic_reduction=self.critic_reduction,
            memory_size=self.memory_size,
            logit_rule=self.logit_rule,
            action_grid=self.action_grid,
            action_bins=self.action_bins,
            critic=self.critic,
        )

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in either training or evaluation mode. Only frozen critics act, and those and the targets stay in
        evaluation mode, so there is nothing to switch.

        :param mode: if true, set to training mode, else set to evaluation mode
        """
        self.training = mode


MlpPolicy = StaQPolicy


class CnnPolicy(StaQPolicy):
    """``StaQPolicy`` for image observations: ``NatureCNN`` by default."""

    default_features_extractor_class = NatureCNN


class MultiInputPolicy(StaQPolicy):
    """``StaQPolicy`` for Dict observations: ``CombinedExtractor`` by default."""

    default_features_extractor_class = CombinedExtractor
