"""
Action spaces as a product of categorical choices ("groups"): the form in which mirror descent is closed-form.

A policy is the product of one softmax per group, a critic is a sum of one value per group. ``choices`` are the indices
chosen within each group, shape (batch, number of groups). "Stored" actions are what SB3's replay buffers hold, shape
(batch, action_dim): the actions themselves, but scaled to [-1, 1] for Box.
"""

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from torch import nn

SUPPORTED_ACTION_SPACES = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Box)
ACTION_GRIDS = ("factored", "axis", "joint")
MAX_JOINT_CHOICES = 4096


def _sample(log_pi: th.Tensor) -> th.Tensor:
    """Choices drawn from log-probabilities: shape (..., n_choices) -> (...). Inverts the distribution function."""
    cumulative = log_pi.exp().cumsum(dim=-1)
    threshold = th.rand_like(cumulative[..., -1:]) * cumulative[..., -1:]
    return (cumulative[..., :-1] <= threshold).sum(dim=-1)


class ActionGroups(nn.Module):
    """
    Groups of choices. Logits and Q-values have one column per choice, group after group. A module, so that its
    constants move with the policy; nothing of it is saved.

    :param sizes: the number of choices of each group
    """

    # Number of components of a Box action; 0 for the spaces whose actions are names, not quantities
    box_dim = 0

    _offsets: th.Tensor
    _last: th.Tensor

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.sizes = tuple(sizes)
        # The column of each group's first choice
        self._constant("_offsets", th.as_tensor(np.cumsum([0, *sizes[:-1]])))
        self._constant("_last", th.as_tensor(sizes) - 1)

    def _constant(self, name: str, value: th.Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    @property
    def n_choices(self) -> int:
        """The number of columns of the logits."""
        return sum(self.sizes)

    def decode(self, choices: th.Tensor) -> th.Tensor:
        """
        :param choices: shape (batch, number of groups)
        :return: stored actions, shape (batch, action_dim)
        """
        raise NotImplementedError

    def encode(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: stored actions of any agent, shape (batch, action_dim)
        :return: the nearest choices, shape (batch, number of groups)
        """
        raise NotImplementedError

    def columns(self, choices: th.Tensor) -> th.Tensor:
        """
        :param choices: shape (batch, number of groups)
        :return: their columns in logits and Q-values, same shape
        """
        return choices + self._offsets

    def sample(self, log_pi: th.Tensor) -> th.Tensor:
        """
        :param log_pi: log-probabilities, shape (batch, n_choices)
        :return: choices drawn from them, shape (batch, number of groups)
        """
        return self._choose(_sample, log_pi)

    def mode(self, logits: th.Tensor) -> th.Tensor:
        """
        :param logits: shape (batch, n_choices)
        :return: the most probable choices, shape (batch, number of groups)
        """
        return self._choose(partial(th.argmax, dim=-1), logits)

    def deterministic(self, logits: th.Tensor) -> th.Tensor:
        """
        :param logits: shape (batch, n_choices)
        :return: the stored actions of the policy where nothing is left to chance, shape (batch, action_dim): the most
            probable ones
        """
        return self.decode(self.mode(logits))

    def _choose(self, rule: Callable[[th.Tensor], th.Tensor], x: th.Tensor) -> th.Tensor:
        """Apply a rule, from the columns of a group to one of them, to each group."""
        if len(set(self.sizes)) == 1:  # all of them at once
            return rule(x.unflatten(1, (-1, self.sizes[0])))
        return th.stack([rule(group) for group in x.split(self.sizes, dim=1)], dim=1)

    def one_hot(self, choices: th.Tensor) -> th.Tensor:
        """
        :param choices: shape (batch, number of groups)
        :return: 1 in the columns of the choices and 0 elsewhere, shape (batch, n_choices)
        """
        zeros = th.zeros(len(choices), self.n_choices, device=choices.device)
        return zeros.scatter_(1, self.columns(choices), 1.0)

    @property
    def n_inputs(self) -> int:
        """Number of components of :meth:`inputs`."""
        return self.box_dim or self.n_choices

    def inputs(self, actions: th.Tensor) -> th.Tensor:
        """
        What a network that takes whole actions is given: actions of a Box as they are, others one-hot encoded.

        :param actions: stored actions, shape (batch, action_dim)
        :return: shape (batch, n_inputs)
        """
        return actions if self.box_dim else self.one_hot(self.encode(actions))

    def sweep(self, choices: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Vary one group of each action over all its choices; pairs of successive actions take turns in which group, from
        a random one on.

        :param choices: shape (batch, number of groups)
        :return: the varied choices, shape (batch, max(sizes), number of groups); the columns of the varied group's
            choices and whether there are that many (a smaller group repeats its last), both of shape
            (batch, max(sizes))
        """
        device = choices.device
        first = th.randint(len(self.sizes), (1,), device=device)  # a batch may have fewer actions than groups
        group = (first + th.arange(len(choices), device=device) // 2) % len(self.sizes)
        last = self._last[group].unsqueeze(1)
        options = th.arange(max(self.sizes), device=device).expand(len(choices), -1)
        valid = options <= last
        options = options.minimum(last)
        varied = choices.unsqueeze(1).repeat(1, max(self.sizes), 1)
        varied.scatter_(2, group.view(-1, 1, 1).expand(-1, max(self.sizes), 1), options.unsqueeze(2))
        return varied, self._offsets[group].unsqueeze(1) + options, valid

    def uniform(self, batch_size: int) -> th.Tensor:
        """
        :param batch_size: number of actions
        :return: choices drawn uniformly, shape (batch_size, number of groups)
        """
        return th.cat([th.randint(size, (batch_size, 1)) for size in self.sizes], dim=1).to(self._offsets.device)

    def distribution(self, logits: th.Tensor) -> Distribution:
        """
        :param logits: shape (batch, n_choices)
        :return: the policy as SB3's distribution over choices
        """
        if len(self.sizes) == 1:
            return CategoricalDistribution(self.n_choices).proba_distribution(logits)
        return MultiCategoricalDistribution(list(self.sizes)).proba_distribution(logits)


def _mean_choice(logits: th.Tensor) -> th.Tensor:
    """The mean of the choices' numbers under a softmax: shape (..., n_choices) -> (...)."""
    numbers = th.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return logits.softmax(dim=-1) @ numbers


class EvenlySpacedGroups(ActionGroups):
    """
    One group for each component of the action, whose choices are evenly spaced numbers. Those of a Box are quantities:
    its deterministic action is the mean of the policy, as that of SB3's Gaussian policies is, and may lie between them.

    :param sizes: the number of choices of each component
    :param lowest: first choice of each component
    :param spacing: difference of successive choices of each component
    :param dtype: of the stored actions
    """

    _lowest: th.Tensor
    _spacing: th.Tensor

    def __init__(self, sizes: list[int], lowest: np.ndarray, spacing: np.ndarray, dtype: th.dtype):
        super().__init__(sizes)
        self._constant("_lowest", th.as_tensor(lowest, dtype=th.float64))
        self._constant("_spacing", th.as_tensor(spacing, dtype=th.float64))
        self._dtype = dtype
        self.box_dim = len(sizes) if dtype.is_floating_point else 0

    def decode(self, choices: th.Tensor) -> th.Tensor:
        return (self._lowest + self._spacing * choices).to(self._dtype)

    def encode(self, actions: th.Tensor) -> th.Tensor:
        steps = (actions - self._lowest) / self._spacing
        return steps.round().long().clamp(min=0).minimum(self._last)

    def deterministic(self, logits: th.Tensor) -> th.Tensor:
        return self.decode(self._choose(_mean_choice, logits)) if self.box_dim else super().deterministic(logits)


class ListedGroup(ActionGroups):
    """
    A single group, whose choices are whole actions.

    :param actions: the stored action of each choice, shape (number of choices, action_dim)
    """

    _actions: th.Tensor
    _half_norms: th.Tensor

    def __init__(self, actions: np.ndarray):
        super().__init__([len(actions)])
        self._constant("_actions", th.as_tensor(actions, dtype=th.float32))
        self._constant("_half_norms", self._actions.square().sum(dim=1) / 2)
        self.box_dim = actions.shape[1]

    def decode(self, choices: th.Tensor) -> th.Tensor:
        return self._actions[choices.squeeze(1)]

    def encode(self, actions: th.Tensor) -> th.Tensor:
        # |a - c|^2 / 2 = |a|^2 / 2 - (a . c - |c|^2 / 2), at a tenth of the time that th.cdist takes
        return (actions.float() @ self._actions.T - self._half_norms).argmax(dim=1, keepdim=True)


def flatten_action_space(space: spaces.Space) -> spaces.Space:
    """
    :param space: an action space
    :return: the space of the same actions as vectors, for a MultiDiscrete or MultiBinary of several dimensions, which
        SB3's replay buffers cannot hold; others as they are
    """
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim != 1:
        return spaces.MultiDiscrete(space.nvec.flatten(), dtype=space.dtype, start=space.start.flatten())  # type: ignore[arg-type]
    if isinstance(space, spaces.MultiBinary) and len(space.shape) != 1:
        return spaces.MultiBinary(int(np.prod(space.shape)))
    return space


def make_action_groups(space: spaces.Space, action_grid: str = "factored", action_bins: int = 5) -> ActionGroups:
    """
    :param space: the action space
    :param action_grid: for Box with d dimensions: "factored" (d groups of ``action_bins`` evenly spaced values), "axis"
        (one group: zero, and each dimension at either bound) or "joint" (one group of ``action_bins**d``)
    :param action_bins: number of values per dimension of a Box for "factored" and "joint"
    :return: its groups of choices
    :raise ValueError: if the space is not supported, or has too many joint choices; says what is accepted
    """
    space = flatten_action_space(space)
    if isinstance(space, spaces.Discrete):
        return EvenlySpacedGroups([int(space.n)], np.array([space.start]), np.ones(1), th.int64)
    if isinstance(space, spaces.MultiDiscrete):
        return EvenlySpacedGroups(space.nvec.tolist(), space.start, np.ones(len(space.nvec)), th.int64)
    if isinstance(space, spaces.MultiBinary):
        n_bits = space.shape[0]
        return EvenlySpacedGroups([2] * n_bits, np.zeros(n_bits), np.ones(n_bits), th.int64)
    if isinstance(space, spaces.Box):
        if not np.issubdtype(space.dtype, np.floating):
            raise ValueError(
                f"action_space={space} holds {space.dtype}, which SB3's replay buffers, where actions are scaled to "
                "[-1, 1], cannot store; accepted: a Box of floats, or MultiDiscrete"
            )
        return _make_box_groups(int(np.prod(space.shape)), action_grid, int(action_bins))
    supported = ", ".join(supported.__name__ for supported in SUPPORTED_ACTION_SPACES)
    raise ValueError(f"action_space={space} is not supported by StaQ; supported: {supported}")


def _make_box_groups(n_dims: int, action_grid: str, action_bins: int) -> ActionGroups:
    bins = np.linspace(-1.0, 1.0, action_bins)
    if action_grid == "factored":
        return EvenlySpacedGroups(
            [action_bins] * n_dims, np.full(n_dims, -1.0), np.full(n_dims, 2 / (action_bins - 1)), th.float32
        )
    if action_grid == "axis":
        eye = np.eye(n_dims)
        return ListedGroup(np.concatenate([np.zeros((1, n_dims)), -eye, eye]))
    if action_bins**n_dims > MAX_JOINT_CHOICES:
        raise ValueError(
            f"action_grid='joint' with action_bins={action_bins} and {n_dims} dimensions has {action_bins**n_dims} "
            f"choices; accepted: at most {MAX_JOINT_CHOICES}, or another action_grid"
        )
    return ListedGroup(np.array(list(itertools.product(bins, repeat=n_dims))))
