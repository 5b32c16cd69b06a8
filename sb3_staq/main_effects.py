"""The extension to continuous actions: critics of whole actions, and a small network of their main effects.

This is not in the paper. In an additive critic, each dimension of an action counts by itself, which makes the policy
update exact. For a Box this is not enough: its critics take state and action, as in SAC, and a small network learns
their main effects under the policy,

    A_d(s, a_d) = E_{a'~pi}[Q(s, a') | a'_d = a_d],

the best additive approximation of Q(s, .) under pi. A policy update freezes the Polyak average of this network.
"""

from typing import NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_staq.action_spaces import Branches
from sb3_staq.observations import select
from sb3_staq.q_networks import Critic, CriticEnsemble, Ensemble, batched_forward


class StateActionCritics(Ensemble[Critic]):
    """Several critics of whole actions: features extractors, then MLPs from features and action to one value."""

    def forward(self, obs: PyTorchObs, actions: th.Tensor, rows: th.Tensor | None = None) -> th.Tensor:
        """
        Compute the Q-values of each member at preprocessed observations.

        :param actions: shape (n_actions, n_inputs)
        :param rows: the index of each action's observation, shape (n_actions,); by default one action per observation
        :return: shape (n_critics, n_actions)
        """
        features = batched_forward(self.net, self.params, obs, end=1)
        if rows is not None:
            features = features.index_select(-2, rows)  # extracted once for all actions of an observation
        x = th.cat([features, actions.expand(*features.shape[:-1], -1)], dim=-1)
        return batched_forward(self.net, self.params, x, start=1, shared_input=x.dim() == 2).squeeze(-1)


class SampledActions(NamedTuple):
    """Actions drawn from the policy, and copies of them with one branch varied over all its bins."""

    inputs: th.Tensor  # what the critics take, shape (batch, n_inputs)
    varied_inputs: th.Tensor  # shape (batch, n_varied, n_inputs)
    columns: th.Tensor  # of the varied bins, shape (batch, n_varied)
    valid: th.Tensor  # whether the branch has that many bins, same shape
    prob: th.Tensor  # of the varied bins, 0 where not valid, same shape


class Sweep(NamedTuple):
    """Q-values of actions with one branch varied over all its bins."""

    obs: PyTorchObs  # preprocessed, of n_swept states
    columns: th.Tensor  # of the varied bins, shape (n_swept, n_varied)
    valid: th.Tensor  # whether the branch has that many bins, same shape
    q_values: th.Tensor  # same shape


@th.no_grad()
def sample_actions(branches: Branches, log_prob: th.Tensor) -> SampledActions:
    """Draw one action per observation from a policy, shape (batch, n_bins), for :func:`expected_q_values`."""
    bins = branches.sample(log_prob)
    varied, columns, valid = vary_one_branch(branches, bins)
    return SampledActions(
        inputs=branches.inputs(branches.decode(bins)),
        varied_inputs=branches.inputs(branches.decode(varied.flatten(0, 1))).unflatten(0, columns.shape),
        columns=columns,
        valid=valid,
        prob=log_prob.gather(1, columns).exp() * valid,
    )


def vary_one_branch(branches: Branches, bins: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Vary one branch of each action over all its bins.

    Successive pairs of actions take the branches in turn, from a random one on; one action of each pair is swept.

    :param bins: shape (batch, number of branches)
    :return: the varied bins, shape (batch, max(sizes), number of branches); the columns of the varied branch's bins and
        whether there are that many (a smaller branch repeats its last), both of shape (batch, max(sizes))
    """
    n_branches, n_varied, device = len(branches.sizes), max(branches.sizes), bins.device
    first = th.randint(n_branches, (1,), device=device)  # a batch may have fewer actions than branches
    branch = (first + th.arange(len(bins), device=device) // 2) % n_branches
    last = branches.last[branch].unsqueeze(1)
    options = th.arange(n_varied, device=device).expand(len(bins), -1)
    valid = options <= last
    options = options.minimum(last)
    varied = bins.unsqueeze(1).repeat(1, n_varied, 1)
    varied.scatter_(2, branch.view(-1, 1, 1).expand(-1, n_varied, 1), options.unsqueeze(2))
    return varied, branches.offsets[branch].unsqueeze(1) + options, valid


@th.no_grad()
def expected_q_values(
    critics: StateActionCritics, obs: PyTorchObs, actions: SampledActions, n_branches: int
) -> tuple[th.Tensor, Sweep]:
    """
    Estimate ``E_{a~pi}[Q(s,a)]`` with each critic, at preprocessed observations.

    At every other state (at all states if there is only one branch), one branch of the drawn action is swept, so the
    expectation is exact in that branch. The other states take the drawn action as it is.

    :param actions: from :func:`sample_actions`, one for each observation
    :return: the expectations, shape (n_critics, batch), and what was swept
    """
    # Every other one, not the first half: replay buffers like HER's end a batch with transitions of another kind
    swept, drawn = (slice(None), slice(0)) if n_branches == 1 else (slice(None, None, 2), slice(1, None, 2))
    columns, batch_size = actions.columns[swept], len(actions.inputs)
    rows = th.arange(batch_size, device=columns.device)
    inputs = th.cat([actions.varied_inputs[swept].flatten(0, 1), actions.inputs[drawn]])
    rows_of_inputs = th.cat([rows[swept].repeat_interleave(columns.shape[1]), rows[drawn]])
    q_values = critics(obs, inputs, rows_of_inputs)
    q_swept = q_values[:, : columns.numel()].unflatten(1, columns.shape)
    expected = q_values.new_empty(len(q_values), batch_size)
    expected[:, swept] = (actions.prob[swept] * q_swept).sum(dim=2).to(expected.dtype)
    expected[:, drawn] = q_values[:, columns.numel() :]
    return expected, Sweep(select(obs, swept), columns, actions.valid[swept], q_swept.mean(dim=0))


def main_effects_loss(main_effects: CriticEnsemble, sweep: Sweep) -> th.Tensor:
    """
    Compute the mean squared error of the main effects, ``E[Q(s,a) | a_d]`` over the other branches under the policy.

    Only differences within a branch matter to a softmax, so only these are fitted. Otherwise, states of high value
    would drown them out.
    """
    error = main_effects.q_values(sweep.obs).gather(1, sweep.columns) - sweep.q_values
    mean_error = (sweep.valid * error).sum(dim=1, keepdim=True) / sweep.valid.sum(dim=1, keepdim=True)
    return (sweep.valid * (error - mean_error).square()).sum() / sweep.valid.sum()
