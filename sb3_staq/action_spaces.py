"""
Gymnasium action spaces as products of categoricals, the form in which mirror descent has a closed form.

Each action dimension is a *branch* with a number of *bins*. A policy is the product of one softmax per branch, and an
additive critic is the sum of one value per branch. Logits and Q-values have one column per bin, branch after branch;
``bins`` are the indices chosen within each branch, shape (batch, number of branches). *Stored* actions are what SB3's
replay buffers hold, shape (batch, action_dim): the actions themselves, scaled to [-1, 1] for a Box.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution, MultiCategoricalDistribution
from torch import nn

SUPPORTED_ACTION_SPACES = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Box)
ACTION_GRIDS = ("factored", "axis", "joint")
MAX_JOINT_BINS = 4096
# A second peak of a policy over the values of a Box counts if it rises above the valley by more than this probability
MIN_PEAK = 0.1


def _sample(log_prob: th.Tensor) -> th.Tensor:
    """Draw bins, shape (..., n_bins) -> (...), by inverting the cumulative distribution function."""
    cumulative = log_prob.exp().cumsum(dim=-1)
    threshold = th.rand_like(cumulative[..., -1:]) * cumulative[..., -1:]
    return (cumulative[..., :-1] <= threshold).sum(dim=-1)


class Branches(nn.Module):
    """
    The branches of an action space, as a module whose constants move with the policy but are not saved.

    :param sizes: number of bins of each branch
    """

    # Number of components of a Box action; 0 for spaces whose actions are labels, not quantities
    box_dim = 0

    offsets: th.Tensor
    last: th.Tensor

    def __init__(self, sizes: Sequence[int]):
        super().__init__()
        self.sizes = tuple(sizes)
        # The column of each branch's first bin, and the index of its last
        self._constant("offsets", th.as_tensor(np.cumsum([0, *sizes[:-1]])))
        self._constant("last", th.as_tensor(sizes) - 1)

    def _constant(self, name: str, value: th.Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    @property
    def n_bins(self) -> int:
        """The number of columns of the logits."""
        return sum(self.sizes)

    @property
    def n_inputs(self) -> int:
        """Number of components of :meth:`inputs`."""
        return self.box_dim or self.n_bins

    def decode(self, bins: th.Tensor) -> th.Tensor:
        """Turn bins into stored actions: shape (batch, number of branches) -> (batch, action_dim)."""
        raise NotImplementedError

    def encode(self, actions: th.Tensor) -> th.Tensor:
        """
        Find the bins nearest to stored actions, which may be those of any agent.

        :param actions: shape (batch, action_dim)
        :return: shape (batch, number of branches)
        """
        raise NotImplementedError

    def columns(self, bins: th.Tensor) -> th.Tensor:
        """Map bins to their columns in logits and Q-values, both of shape (batch, number of branches)."""
        return bins + self.offsets

    def sample(self, log_prob: th.Tensor) -> th.Tensor:
        """Draw bins from log-probabilities: shape (batch, n_bins) -> (batch, number of branches)."""
        return self._choose(_sample, log_prob)

    def mode(self, logits: th.Tensor) -> th.Tensor:
        """Find the most probable bins: shape (batch, n_bins) -> (batch, number of branches)."""
        return self._choose(partial(th.argmax, dim=-1), logits)

    def deterministic(self, logits: th.Tensor) -> th.Tensor:
        """
        Return the stored actions of the deterministic policy: the most probable ones.

        :param logits: shape (batch, n_bins)
        :return: shape (batch, action_dim)
        """
        return self.decode(self.mode(logits))

    def _choose(self, rule: Callable[[th.Tensor], th.Tensor], x: th.Tensor) -> th.Tensor:
        """Apply to each branch a rule that maps its columns to one number."""
        if len(set(self.sizes)) == 1:  # all branches at once
            return rule(x.unflatten(1, (-1, self.sizes[0])))
        return th.stack([rule(branch) for branch in x.split(self.sizes, dim=1)], dim=1)

    def one_hot(self, bins: th.Tensor) -> th.Tensor:
        """Encode bins, one per branch, as vectors of 0 and 1: (batch, number of branches) -> (batch, n_bins)."""
        zeros = th.zeros(len(bins), self.n_bins, device=bins.device)
        return zeros.scatter_(1, self.columns(bins), 1.0)

    def inputs(self, actions: th.Tensor) -> th.Tensor:
        """
        Return the input of a network of whole actions: those of a Box as they are, others one-hot encoded.

        :param actions: stored actions, shape (batch, action_dim)
        :return: shape (batch, n_inputs)
        """
        return actions if self.box_dim else self.one_hot(self.encode(actions))

    def uniform(self, batch_size: int) -> th.Tensor:
        """Draw bins uniformly, shape (batch_size, number of branches)."""
        return th.cat([th.randint(size, (batch_size, 1)) for size in self.sizes], dim=1).to(self.offsets.device)

    def distribution(self, logits: th.Tensor) -> Distribution:
        """Return the policy as an SB3 distribution over bins, from logits of shape (batch, n_bins)."""
        if len(self.sizes) == 1:
            return CategoricalDistribution(self.n_bins).proba_distribution(logits)
        return MultiCategoricalDistribution(list(self.sizes)).proba_distribution(logits)


def _mean_or_mode(logits: th.Tensor) -> th.Tensor:
    """
    Return the mean of the bins' numbers if the softmax has a single peak, else the number of the best bin.

    The mean of a policy with two peaks may be the very value that it avoids. Shape (..., n_bins) -> (...).
    """
    prob = logits.softmax(dim=-1)
    numbers = th.arange(logits.shape[-1], dtype=prob.dtype, device=logits.device)
    left = numbers <= numbers.unsqueeze(1)  # row i: the bins up to i
    highest = [prob.unsqueeze(-2).where(side, 0.0).amax(dim=-1) for side in (left, left.T)]
    depth_of_valley = (th.minimum(*highest) - prob).amax(dim=-1)
    mode = logits.argmax(dim=-1).to(prob.dtype)
    return th.where(depth_of_valley > MIN_PEAK, mode, (prob * numbers).sum(dim=-1))


class EvenlySpacedBranches(Branches):
    """
    One branch for each component of the action, whose bins are evenly spaced numbers.

    The bins of a Box are quantities. Its deterministic action is the mean of the policy, as with SB3's Gaussian
    policies, and may lie between bins; where the policy has two peaks, it is the best bin.

    :param sizes: number of bins of each component
    :param lowest: first bin of each component
    :param spacing: difference between successive bins of each component
    :param dtype: type of the stored actions, integers or floats
    """

    lowest: th.Tensor
    spacing: th.Tensor

    def __init__(self, sizes: Sequence[int], lowest: np.ndarray, spacing: np.ndarray, dtype: th.dtype):
        super().__init__(sizes)
        self._constant("lowest", th.as_tensor(lowest, dtype=dtype))
        self._constant("spacing", th.as_tensor(spacing, dtype=dtype))
        self.box_dim = len(sizes) if dtype.is_floating_point else 0

    def decode(self, bins: th.Tensor) -> th.Tensor:
        """Turn bins into stored actions."""
        return self.lowest + self.spacing * bins

    def encode(self, actions: th.Tensor) -> th.Tensor:
        """Find the bins nearest to stored actions."""
        steps = (actions - self.lowest) / self.spacing
        return steps.round().long().clamp(min=0).minimum(self.last)

    def deterministic(self, logits: th.Tensor) -> th.Tensor:
        """Return the mean or, if not a Box, the best bins."""
        return self.decode(self._choose(_mean_or_mode, logits)) if self.box_dim else super().deterministic(logits)


class ListedBranch(Branches):
    """
    A single branch, whose bins are whole actions.

    :param actions: the stored action of each bin, shape (number of bins, action_dim)
    """

    actions: th.Tensor
    half_norms: th.Tensor

    def __init__(self, actions: np.ndarray):
        super().__init__([len(actions)])
        self._constant("actions", th.as_tensor(actions, dtype=th.float32))
        self._constant("half_norms", self.actions.square().sum(dim=1) / 2)
        self.box_dim = actions.shape[1]

    def decode(self, bins: th.Tensor) -> th.Tensor:
        """Turn bins into stored actions."""
        return self.actions[bins.squeeze(1)]

    def encode(self, actions: th.Tensor) -> th.Tensor:
        """Find the bins nearest to stored actions."""
        # |a - c|^2 / 2 = |a|^2 / 2 - (a . c - |c|^2 / 2), in a tenth of the time of th.cdist
        return (actions.float() @ self.actions.T - self.half_norms).argmax(dim=1, keepdim=True)


def flatten_action_space(space: spaces.Space) -> spaces.Space:
    """
    Return the space of the same actions as vectors, which SB3's replay buffers need.

    Only a MultiDiscrete or MultiBinary of several dimensions is not flat.
    """
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim != 1:
        return spaces.MultiDiscrete(space.nvec.flatten(), dtype=space.dtype, start=space.start.flatten())  # type: ignore[arg-type]
    if isinstance(space, spaces.MultiBinary) and len(space.shape) != 1:
        return spaces.MultiBinary(int(np.prod(space.shape)))
    return space


def make_branches(space: spaces.Space, action_grid: str = "factored", action_bins: int = 5) -> Branches:
    """
    Make the branches of an action space.

    :param action_grid: for a Box with d dimensions: "factored" (d branches of ``action_bins`` evenly spaced values),
        "axis" (one branch: the middle, and each dimension at either bound) or "joint" (one of ``action_bins**d`` bins)
    :param action_bins: number of values per dimension of a Box for "factored" and "joint"
    :raise ValueError: if the space is not supported, or has too many joint bins
    """
    if isinstance(space, SUPPORTED_ACTION_SPACES) and 0 in (space.shape or ()):
        raise ValueError(f"Invalid action_space={space}: expected at least one component")
    space = flatten_action_space(space)
    if isinstance(space, spaces.Discrete):
        return EvenlySpacedBranches([int(space.n)], np.array([space.start]), np.ones(1), th.int64)
    if isinstance(space, spaces.MultiDiscrete):
        return EvenlySpacedBranches(space.nvec.tolist(), space.start, np.ones(len(space.nvec)), th.int64)
    if isinstance(space, spaces.MultiBinary):
        n_bits = space.shape[0]
        return EvenlySpacedBranches([2] * n_bits, np.zeros(n_bits), np.ones(n_bits), th.int64)
    if isinstance(space, spaces.Box):
        _check_box(space)
        return _make_box_branches(int(np.prod(space.shape)), action_grid, int(action_bins))
    supported = ", ".join(supported.__name__ for supported in SUPPORTED_ACTION_SPACES)
    raise ValueError(f"Invalid action_space={space}: expected one of {supported}")


def _check_box(space: spaces.Box) -> None:
    if not np.issubdtype(space.dtype, np.floating):
        raise ValueError(
            f"Invalid action_space={space}: expected a Box of floats, since SB3's replay buffers hold actions scaled "
            "to [-1, 1]; MultiDiscrete is for whole numbers"
        )
    with np.errstate(over="ignore"):
        finite = np.isfinite((space.high - space.low).astype(np.float32)).all()
    if not finite:
        raise ValueError(
            f"Invalid action_space={space}: expected bounds whose difference is a finite float; rescale the actions"
        )


def _make_box_branches(n_dims: int, action_grid: str, action_bins: int) -> Branches:
    bins = np.linspace(-1.0, 1.0, action_bins)
    if action_grid == "factored":
        lowest, spacing = np.full(n_dims, -1.0), np.full(n_dims, 2 / (action_bins - 1))
        return EvenlySpacedBranches([action_bins] * n_dims, lowest, spacing, th.float32)
    if action_grid == "axis":
        eye = np.eye(n_dims)
        return ListedBranch(np.concatenate([np.zeros((1, n_dims)), -eye, eye]))
    if action_bins**n_dims > MAX_JOINT_BINS:
        raise ValueError(
            f"Invalid action_grid='joint': action_bins={action_bins} in {n_dims} dimensions make "
            f"{action_bins**n_dims} bins; expected at most {MAX_JOINT_BINS}, or another action_grid"
        )
    return ListedBranch(np.array(list(itertools.product(bins, repeat=n_dims))))
