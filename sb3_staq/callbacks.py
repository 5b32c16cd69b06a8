"""Callbacks for researchers: what each policy update does, written to a file."""

import copy
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor

from sb3_staq.arguments import CALLBACK_ARGUMENTS, check_argument
from sb3_staq.mirror_descent import StackWeights, centre, entropy, kl_divergence, log_policy, max_entropy
from sb3_staq.observations import select
from sb3_staq.save_util import atomic_write
from sb3_staq.staq import PolicyUpdateInfo, StaQ

DIAGNOSTICS_HEADER = "policy_update,step,kl,lost_kl,entropy,action_gap,kl_coef,ent_coef,shares\n"


class PolicyUpdateDiagnostics(BaseCallback):
    """
    Write one line to a CSV file per policy update. It does not affect the training: it draws no random numbers.

    All numbers of a line are means over the same stored states, evenly spaced over the replay buffer. ``pi_{k+1}`` is
    the policy after the update and ``xi_{k+1} = sum_i w_i Q_i`` its logits, with the actual weights ``w_i`` (scale
    included) of the critics ``Q_i`` in the stack.

    ``policy_update``
        ``k + 1``, the number of policy updates so far
    ``step``
        environment steps so far
    ``kl``
        ``KL(pi_{k+1} || pi_k)`` in nats, summed over the branches
    ``lost_kl``
        ``KL(pi_{k+1} || pi')`` in nats, what was lost with the critic that the update deleted: ``pi'`` is what the same
        rule with ``memory_size + 1`` makes of the same critics and the deleted one. For "weight_corrected" and constant
        coefficients its logits are ``alpha / (1 - beta^(M+1)) * sum_{i=0}^M beta^i Q_{k-i}``. If ``memory_size`` was
        lowered, all deleted critics count. It is 0 if nothing was deleted, and NaN for custom weights, which define no
        weight for a critic of that age.
    ``entropy``
        entropy of ``pi_{k+1}`` over that of the uniform policy, from 0 to 1 (0 if there is only one bin)
    ``action_gap``
        difference between the best and the second-best bin in ``xi_{k+1} / sum_i |w_i|``, the mean Q-function that
        the policy is made of, in units of (scaled) reward: a mean over the branches with at least two bins
    ``kl_coef``, ``ent_coef``
        the coefficients in force
    ``shares``
        how much of the logits comes from the critics of each age, newest first, separated by spaces: ``|w_i|`` times
        the mean of ``|Q_i(s,a) - mean_b Q_i(s,b)|`` (over the bins b of a's branch), normalised to sum to 1

    The file can be read at any time, see :func:`sb3_staq.plotting.read_diagnostics`. A training that resumes from a
    checkpoint continues its file. Lines of policy updates that the model has not done yet are dropped, so a new model
    starts a new file.

    :param path: the CSV file
    :param n_states: number of states; all that are stored if there are fewer. The cost per policy update is one
        evaluation of the whole stack at these states.
    :param verbose: Verbosity level, see ``BaseCallback``
    :raise ValueError: if ``n_states`` is out of range, the algorithm is not StaQ, or the file is of another kind
    """

    model: StaQ

    def __init__(self, path: str | Path, n_states: int = 256, verbose: int = 0):
        super().__init__(verbose)
        check_argument("n_states", n_states, CALLBACK_ARGUMENTS)
        self.path = Path(path)
        self.n_states = n_states

    def _init_callback(self) -> None:
        if not isinstance(self.model, StaQ):
            raise ValueError(f"Invalid model={self.model!r}: expected a StaQ model, which has policy updates")

    def _on_training_start(self) -> None:
        self._known_lines()  # refuses other kinds of files
        self.model.policy_update_hooks.append(self._on_first_update)

    def _known_lines(self) -> list[str]:
        """Return the lines of the file for earlier policy updates of this training."""
        lines = complete_lines(self.path) if self.path.exists() and self.path.stat().st_size > 0 else []
        return [line for line in lines if int(line.split(",")[0]) < self.model.n_policy_updates]

    def _on_first_update(self, info: PolicyUpdateInfo) -> None:
        """Start or continue the file: by now, a later ResumeCallback has restored the number of updates."""
        with atomic_write(self.path) as file:
            file.write("".join([DIAGNOSTICS_HEADER, *self._known_lines()]).encode())
        hooks = self.model.policy_update_hooks
        hooks[hooks.index(self._on_first_update)] = self._on_policy_update
        self._on_policy_update(info)

    def _on_step(self) -> bool:
        return True

    def _on_policy_update(self, info: PolicyUpdateInfo) -> None:
        scalars, shares = self._measure(info)
        row = [str(self.model.n_policy_updates), str(self.model.num_timesteps)]
        row += [f"{number:.8g}" for number in (*scalars, info.kl_coef, info.ent_coef)]
        row.append(" ".join(f"{share:.6g}" for share in shares))
        # Reopened for each line, so that none waits in memory when the training is killed
        with open(self.path, "a") as file:
            file.write(",".join(row) + "\n")

    @th.no_grad()
    def _measure(self, info: PolicyUpdateInfo) -> tuple[list[float], np.ndarray]:
        """Compute kl, lost_kl, entropy and action_gap, and the shares by age."""
        policy = self.model.policy
        weights, branches = policy.frozen_critics.weights, policy.branches.sizes
        # The old, the new and the undiminished policy are three weightings of the same critics, oldest first
        n_deleted, n_recent = len(info.deleted), len(weights)
        recent = sorted(range(n_recent), key=policy.frozen_critics.updates.__getitem__)
        critics = [*info.deleted, *(policy.frozen_critics[i] for i in recent)]
        new = [0.0] * n_deleted + _logit_weights(weights)
        old = [*_logit_weights(info.old_weights), 0.0]
        kept = [np.nan] * len(new)
        if weights.recursive:
            larger = copy.copy(info.old_weights)
            larger.memory_size = weights.memory_size + n_deleted
            larger.push(info.kl_coef, info.ent_coef)
            kept = _logit_weights(larger)
        elif n_deleted == 0:
            kept = new

        obs = policy.preprocess(self._observations())
        weightings = th.tensor([new, old, kept], dtype=th.float64)
        logits: th.Tensor = th.zeros(())
        deviations = np.zeros(len(critics))
        for i, entry in enumerate(critics):
            q_values = entry.q_values(obs).cpu().double()
            logits = logits + weightings[:, i, None, None] * q_values
            deviations[i] = centre(q_values, branches).abs().mean()

        log_pi, log_old, log_kept = log_policy(logits, branches)
        best = [branch.topk(2).values for branch in logits[0].split(branches, dim=-1) if branch.shape[-1] > 1]
        gap = float(np.mean([(first - second).mean() for first, second in (b.unbind(dim=-1) for b in best)] or [0.0]))
        contributions = (np.abs(new) * deviations)[::-1][: len(weights)]
        return [
            kl_divergence(log_pi, log_old).mean().item(),
            kl_divergence(log_pi, log_kept).mean().item(),
            entropy(log_pi).mean().item() / (max_entropy(branches) or 1.0),
            gap / (np.abs(new).sum() or 1.0),
        ], contributions / (contributions.sum() or 1.0)

    def _observations(self) -> PyTorchObs:
        """Return stored observations, evenly spaced in each environment, as the critics see them during training."""
        buffer = self.model.replay_buffer
        assert buffer is not None
        n_stored = buffer.size() * buffer.n_envs
        index = np.linspace(0, n_stored - 1, min(self.n_states, n_stored)).astype(int)
        envs, rows = np.divmod(index, buffer.size())
        obs = select(buffer.observations, (rows, envs))
        normalization = self.model.get_vec_normalize_env()
        return obs_as_tensor(obs if normalization is None else normalization.normalize_obs(obs), self.model.device)


def _logit_weights(weights: StackWeights) -> list[float]:
    """Return the factors of the critics in the logits, oldest first."""
    return [weights.scale * value for value in weights.values]


def complete_lines(path: str | Path) -> list[str]:
    """
    Read the lines below the header, except a last one that was cut short when the training was killed.

    :raise ValueError: if it is another kind of file
    """
    header, *lines = Path(path).read_text().splitlines(keepends=True) or [""]
    if header != DIAGNOSTICS_HEADER:
        raise ValueError(
            f"Invalid path={str(path)!r}: expected a file of PolicyUpdateDiagnostics; it begins with {header[:80]!r}"
        )
    return [line for line in lines if line.endswith("\n")]
