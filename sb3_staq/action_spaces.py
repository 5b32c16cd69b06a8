"""Action spaces as a product of categorical choices ("groups"): the form in which mirror descent is closed-form."""

from typing import NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution

SUPPORTED_ACTION_SPACES = (spaces.Discrete,)


class ActionGroups(NamedTuple):
    """
    A finite action space as groups of choices. Logits and Q-values have one column per choice, group after group.

    :param space: the action space
    :param sizes: the number of choices of each group
    """

    space: spaces.Discrete
    sizes: tuple[int, ...]

    @property
    def n_choices(self) -> int:
        """The number of columns of the logits."""
        return sum(self.sizes)

    def decode(self, columns: th.Tensor) -> th.Tensor:
        """
        :param columns: the column chosen in each group, shape (batch, number of groups)
        :return: actions of the space, shape (batch, *space.shape)
        """
        return columns.squeeze(1) + int(self.space.start)

    def encode(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: actions as a replay buffer stores them, shape (batch, action_dim)
        :return: the column chosen in each group, shape (batch, number of groups)
        """
        return actions.long() - int(self.space.start)

    def uniform(self, batch_size: int, device: th.device) -> th.Tensor:
        """
        :param batch_size: number of actions
        :param device: where to draw them
        :return: columns chosen uniformly at random, shape (batch_size, number of groups)
        """
        return th.randint(self.n_choices, (batch_size, 1), device=device)

    def distribution(self, logits: th.Tensor) -> Distribution:
        """
        :param logits: shape (batch, n_choices)
        :return: the policy as SB3's distribution over choices
        """
        return CategoricalDistribution(self.n_choices).proba_distribution(logits)


def make_action_groups(space: spaces.Space) -> ActionGroups:
    """
    :param space: the action space
    :return: its groups of choices
    :raise ValueError: if the space is not supported; the message lists those that are
    """
    if isinstance(space, spaces.Discrete):
        return ActionGroups(space, (int(space.n),))
    supported = ", ".join(kind.__name__ for kind in SUPPORTED_ACTION_SPACES)
    raise ValueError(f"action_space={space} is not supported by StaQ; supported: {supported}")
