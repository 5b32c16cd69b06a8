"""Batches of Markov decision processes that are small enough for exact soft policy evaluation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch as th

from sb3_staq.mirror_descent import expected_value, soft_value

# Start anywhere; moves against a wall or the border do nothing; G is absorbing
GRID = """
........
.####.#.
.#....#.
.#.##.#.
...#...G
"""
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))


@dataclass(frozen=True)
class TabularMDP:
    """
    A batch of MDPs of one size (the batch may have any shape, even none), in double precision.

    :param reward: expected reward of each action, shape (..., states, actions)
    :param transition: probabilities of the next states, shape (..., states, actions, states)
    :param gamma: discount factor
    """

    reward: th.Tensor
    transition: th.Tensor
    gamma: float

    @property
    def n_actions(self) -> int:
        """The number of actions in every state."""
        return self.reward.shape[-1]

    def look_ahead(self, values: th.Tensor) -> th.Tensor:
        """Compute ``r(s,a) + gamma E[V(s')]`` from the values of states: (..., states) -> (..., states, actions)."""
        return self.reward + self.gamma * (self.transition @ values[..., None, :, None]).squeeze(-1)

    def soft_values(self, log_pi: th.Tensor, ent_coef: float) -> th.Tensor:
        """Compute a policy's exact soft values from a linear system: shape (..., states, actions) -> (..., states)."""
        transition = (log_pi.exp()[..., None] * self.transition).sum(dim=-2)
        system = th.eye(transition.shape[-1], dtype=transition.dtype) - self.gamma * transition
        # Reward and entropy of one step are together the soft value of the reward
        return th.linalg.solve(system, soft_value(log_pi, expected_value(log_pi, self.reward), ent_coef))

    def evaluate(self, log_pi: th.Tensor, ent_coef: float) -> th.Tensor:
        """Compute a policy's soft Q-function, see :meth:`soft_values`: shape (..., states, actions) -> the same."""
        return self.look_ahead(self.soft_values(log_pi, ent_coef))

    def optimal_q_values(self, ent_coef: float) -> th.Tensor:
        """Find the optimal soft Q-function by soft value iteration, without policies: shape (..., states, actions)."""
        q_values = th.zeros_like(self.reward)
        # Each sweep shrinks the error by gamma: do as many as double precision takes
        for _ in range(math.ceil(math.log(1e-17) / math.log(self.gamma))):
            q_values = self.look_ahead(ent_coef * th.logsumexp(q_values / ent_coef, dim=-1))
        return q_values


def garnet(seeds: Sequence[int], n_states: int, n_actions: int, branching: int, gamma: float) -> TabularMDP:
    """
    Make random MDPs after Archibald et al. 1995, one per seed: a batch of shape (number of seeds,).

    From every state, each action leads to ``branching`` random states with random probabilities. Rewards are uniform in
    [0, 1].
    """
    rewards, transitions = [], []
    for seed in seeds:
        generator = th.Generator().manual_seed(seed)
        shape = (n_states, n_actions)
        rewards.append(th.rand(shape, generator=generator, dtype=th.float64))
        reachable = th.rand((*shape, n_states), generator=generator, dtype=th.float64).argsort(dim=-1)[..., :branching]
        # The gaps between sorted uniform numbers are uniform on the simplex
        cuts = th.rand((*shape, branching - 1), generator=generator, dtype=th.float64).sort(dim=-1).values
        ends = th.ones((*shape, 1), dtype=th.float64)
        probabilities = th.diff(th.cat([0 * ends, cuts, ends], dim=-1), dim=-1)
        transitions.append(th.zeros((*shape, n_states), dtype=th.float64).scatter_(-1, reachable, probabilities))
    return TabularMDP(th.stack(rewards), th.stack(transitions), gamma)


def grid_cells() -> list[tuple[int, int]]:
    """List row and column of each state of the map, in which ``#`` is a wall."""
    return [(i, j) for i, row in enumerate(GRID.split()) for j, symbol in enumerate(row) if symbol != "#"]


def grid_world(gamma: float, slip: float = 0.0) -> TabularMDP:
    """
    Make a maze with reward -1 for every step until the goal ``G``: one MDP, a batch of no dimensions.

    The states are in the order of :func:`grid_cells`, the actions in that of ``MOVES``; with probability ``slip``, a
    random move is made instead of the chosen one.
    """
    index = {cell: state for state, cell in enumerate(grid_cells())}
    moved = th.zeros(len(index), len(MOVES), len(index), dtype=th.float64)
    reward = th.zeros(moved.shape[:2], dtype=th.float64)
    for (i, j), state in index.items():
        at_goal = GRID.split()[i][j] == "G"
        reward[state] = 0.0 if at_goal else -1.0
        for action, (down, right) in enumerate(MOVES):
            target = state if at_goal else index.get((i + down, j + right), state)
            moved[state, action, target] = 1.0
    return TabularMDP(reward, (1 - slip) * moved + slip * moved.mean(dim=1, keepdim=True), gamma)
