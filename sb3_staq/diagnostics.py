"""
What each policy update does, for researchers: a callback that writes it to a file, and a plot of that file.

``python -m sb3_staq.diagnostics FILE [-o PNG]`` draws the plot.
"""

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor

from sb3_staq.critics import CriticEnsemble
from sb3_staq.mirror_descent import StackWeights, entropy, kl_divergence, log_policy, max_entropy
from sb3_staq.save_util import atomic_write
from sb3_staq.staq import StaQ

# Needed to look at the file only, not to train
if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

HEADER = "policy_update,step,kl,lost_kl,entropy,action_gap,kl_coef,ent_coef,shares\n"


class PolicyUpdateDiagnostics(BaseCallback):
    """
    Write one line of a CSV file per policy update. Nothing of the training depends on it: random numbers are not used.

    All numbers are means over the same stored states, evenly spaced over the replay buffer. ``pi_{k+1}`` is the policy
    after the update, ``xi_{k+1} = sum_i w_i Q_i`` its logits, with the actual weights ``w_i`` (scale included) of the
    critics ``Q_i`` in the stack.

    ``policy_update``
        ``k + 1``, the number of policy updates so far
    ``step``
        environment steps so far
    ``kl``
        ``KL(pi_{k+1} || pi_k)`` in nats, summed over the groups of choices
    ``lost_kl``
        ``KL(pi_{k+1} || pi')`` in nats, what was lost with the critic that the update deleted: ``pi'`` is what the same
        rule with ``memory_size + 1`` makes of the same critics and the deleted one. For "weight_corrected" and constant
        coefficients its logits are ``alpha / (1 - beta^(M+1)) * sum_{i=0}^M beta^i Q_{k-i}``. 0 if nothing was deleted;
        NaN for custom weights, which say nothing of a critic of that age.
    ``entropy``
        entropy of ``pi_{k+1}`` over that of the uniform policy, from 0 to 1 (0 if there is but one choice)
    ``action_gap``
        difference between the best and the second-best choice in ``xi_{k+1} / sum_i |w_i|``, the mean Q-function that
        the policy is made of: in units of (scaled) reward. Mean over the groups with at least two choices.
    ``kl_coef``, ``ent_coef``
        the coefficients in force
    ``shares``
        how much of the logits comes from the critics of each age, newest first, separated by spaces: ``|w_i|`` times
        the mean of ``|Q_i(s,a) - mean_b Q_i(s,b)|`` (over the choices b of a's group), normalised to the sum 1

    The file can be read at any time, see :func:`read_diagnostics`. A training that goes on from a checkpoint goes on
    with its file; lines of policy updates that the model does not have yet are dropped, so a new model starts anew.

    :param path: the CSV file
    :param n_states: number of states; all that are stored if there are fewer. The cost per policy update is one
        evaluation of the whole stack at so many states.
    :param verbose: Verbosity level, see ``BaseCallback``
    :raise ValueError: if ``n_states`` is out of range, the algorithm is not StaQ, or the file is another kind of file
    """

    model: StaQ

    def __init__(self, path: str | Path, n_states: int = 256, verbose: int = 0):
        super().__init__(verbose)
        if not (isinstance(n_states, (int, np.integer)) and n_states >= 1):
            raise ValueError(f"n_states={n_states!r} is not accepted; accepted: a whole number >= 1")
        self.path = Path(path)
        self.n_states = n_states

    def _init_callback(self) -> None:
        if not isinstance(self.model, StaQ):
            raise ValueError(f"model={self.model!r} is not accepted; accepted: a StaQ model, which has policy updates")

    def _on_training_start(self) -> None:
        lines = _complete_lines(self.path) if self.path.exists() and self.path.stat().st_size > 0 else []
        known = [line for line in lines if int(line.split(",")[0]) <= self.model._n_policy_updates]
        with atomic_write(self.path) as file:
            file.write("".join([HEADER, *known]).encode())
        self.model.policy_update_hooks.append(self._on_policy_update)

    def _on_step(self) -> bool:
        return True

    def _on_policy_update(
        self, kl_coef: float, ent_coef: float, old_weights: StackWeights, deleted: CriticEnsemble | None
    ) -> None:
        scalars, shares = self._measure(kl_coef, ent_coef, old_weights, deleted)
        row = [str(self.model._n_policy_updates), str(self.model.num_timesteps)]
        row += [f"{number:.8g}" for number in (*scalars, kl_coef, ent_coef)]
        row.append(" ".join(f"{share:.6g}" for share in shares))
        # Opened anew for each line: none waits in memory when the training is killed
        with open(self.path, "a") as file:
            file.write(",".join(row) + "\n")

    @th.no_grad()
    def _measure(
        self, kl_coef: float, ent_coef: float, old_weights: StackWeights, deleted: CriticEnsemble | None
    ) -> tuple[list[float], np.ndarray]:
        """
        :param kl_coef: weight of the KL term
        :param ent_coef: weight of the entropy term
        :param old_weights: of the stack before the update
        :param deleted: the critics that the update deleted
        :return: kl, lost_kl, entropy and action_gap; and the shares by age
        """
        policy = self.model.policy
        weights, groups = policy.frozen_critics.weights, policy.action_groups.sizes
        # The old, the new and the undiminished policy are three weightings of the same critics, oldest first
        critics = [*([] if deleted is None else [deleted]), *policy.frozen_critics]
        new, old = _logit_weights(weights), [*_logit_weights(old_weights), 0.0]
        kept = new
        if deleted is not None:
            new = [0.0, *new]
            kept = [np.nan] * len(new)
            if weights.recursive:
                larger = StackWeights(weights.logit_rule, weights.memory_size + 1)
                larger.load_state_dict(old_weights.state_dict())
                larger.push(kl_coef, ent_coef)
                kept = _logit_weights(larger)

        obs = policy.preprocess(self._observations())
        weightings = th.tensor([new, old, kept], dtype=th.float64)
        logits: th.Tensor = th.zeros(())
        deviations = np.zeros(len(critics))
        for i, entry in enumerate(critics):
            q_values = entry.q_values(obs).cpu().double()
            logits = logits + weightings[:, i, None, None] * q_values
            centred = [group - group.mean(dim=-1, keepdim=True) for group in q_values.split(groups, dim=-1)]
            deviations[i] = th.cat(centred, dim=-1).abs().mean()

        log_pi, log_old, log_kept = log_policy(logits, groups)
        best = [group.topk(2).values for group in logits[0].split(groups, dim=-1) if group.shape[-1] > 1]
        gap = float(np.mean([(first - second).mean() for first, second in (b.unbind(dim=-1) for b in best)] or [0.0]))
        contributions = (np.abs(new) * deviations)[::-1][: len(weights)]
        return [
            kl_divergence(log_pi, log_old).mean().item(),
            kl_divergence(log_pi, log_kept).mean().item(),
            entropy(log_pi).mean().item() / (max_entropy(groups) or 1.0),
            gap / (np.abs(new).sum() or 1.0),
        ], contributions / (contributions.sum() or 1.0)

    def _observations(self) -> PyTorchObs:
        """Stored observations, evenly spaced in each environment, as the critics get to see them in the training."""
        buffer = self.model.replay_buffer
        assert buffer is not None
        n_stored = buffer.size() * buffer.n_envs
        index = np.linspace(0, n_stored - 1, min(self.n_states, n_stored)).astype(int)
        envs, rows = np.divmod(index, buffer.size())
        stored: Any = buffer.observations
        if isinstance(stored, dict):
            obs: Any = {key: array[rows, envs] for key, array in stored.items()}
        else:
            obs = stored[rows, envs]
        normalization = self.model.get_vec_normalize_env()
        return obs_as_tensor(obs if normalization is None else normalization.normalize_obs(obs), self.model.device)


def _logit_weights(weights: StackWeights) -> list[float]:
    """The factors of the critics in the logits, oldest first."""
    return [weights.scale * value for value in weights.values]


def _complete_lines(path: str | Path) -> list[str]:
    """The lines below the header, less a last one that was cut short when the training was killed."""
    header, *lines = Path(path).read_text().splitlines(keepends=True) or [""]
    if header != HEADER:
        raise ValueError(f"path={str(path)!r} is not a file of PolicyUpdateDiagnostics; it begins with {header[:80]!r}")
    return [line for line in lines if line.endswith("\n")]


def read_diagnostics(path: str | Path) -> "pd.DataFrame":
    """
    :param path: a file of :class:`PolicyUpdateDiagnostics`, complete or not
    :return: one row per policy update; ``shares`` holds arrays, one number per critic, newest first
    :raise ValueError: if it is another kind of file
    """
    import pandas as pd

    text = "".join([HEADER, *_complete_lines(path)])
    return pd.read_csv(io.StringIO(text), converters={"shares": lambda text: np.array(text.split(), dtype=float)})


def plot_diagnostics(data: "pd.DataFrame") -> "Figure":
    """
    :param data: at least one policy update, as from :func:`read_diagnostics`
    :return: the figure
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Blue and orange differ for everybody, and dashes from lines in print as well
    blue, orange = "#0072B2", "#D55E00"
    figure = Figure(figsize=(11, 7), layout="constrained")
    kl, normalised_entropy, action_gap, by_age = axes = figure.subplots(2, 2, sharex=True).flat
    updates = data["policy_update"].to_numpy()
    for column, style, color, label in [
        ("kl", "-", blue, r"kl: KL($\pi_{k+1}$ || $\pi_k$), the update"),
        ("lost_kl", "--", orange, r"lost_kl: KL($\pi_{k+1}$ || deleted critic kept)"),
    ]:
        kl.plot(updates, data[column].where(data[column] > 0), style, color=color, label=label)
    kl.set(title="Change of the policy", ylabel="KL divergence (nats)", yscale="log")
    kl.margins(y=0.25)  # room for the legend
    kl.legend(loc="upper right")
    normalised_entropy.plot(updates, data["entropy"], color=blue)
    normalised_entropy.set(title="Entropy", ylabel="relative to the uniform policy", ylim=(-0.02, 1.02))
    action_gap.plot(updates, data["action_gap"], color=blue)
    action_gap.set(
        title="Action gap of the mean Q-function (action_gap)", ylabel="best less second best (scaled reward)"
    )

    shares = np.zeros((max(map(len, data["shares"])), len(data)))
    for column, numbers in zip(shares.T, data["shares"], strict=True):
        column[: len(numbers)] = numbers
    edges = np.append(updates - 0.5, updates[-1] + 0.5), np.arange(len(shares) + 1) - 0.5
    top = shares.max() or 1.0
    bottom = np.clip(shares[shares > 0].min(initial=top), 1e-4 * top, 0.1 * top)
    mesh = by_age.pcolormesh(*edges, np.ma.masked_equal(shares, 0), norm=LogNorm(bottom, top), cmap="viridis")
    figure.colorbar(mesh, ax=by_age, label="share of the logits", extend="min")
    by_age.set(title="Share of the logits by age of the critic (shares)", ylabel="age (policy updates)")
    for ax in axes[:3]:
        ax.grid(alpha=0.3)
    for ax in axes[2:]:
        ax.set_xlabel("policy update")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_age.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"{len(data)} policy updates, {data['step'].iloc[-1]:,} environment steps")
    return figure


def main() -> None:
    """Draw the file of a PolicyUpdateDiagnostics callback."""
    parser = argparse.ArgumentParser(prog="python -m sb3_staq.diagnostics", description=main.__doc__)
    parser.add_argument("file", type=Path, help="the CSV file; that of a running training is fine")
    parser.add_argument("-o", "--output", type=Path, help="the image; FILE.png if not given")
    args = parser.parse_args()
    output = args.output or args.file.with_suffix(".png")
    try:
        data = read_diagnostics(args.file)
        if data.empty:
            raise ValueError(f"{args.file} holds no policy update yet")
        plot_diagnostics(data).savefig(output, dpi=100)
    except ModuleNotFoundError as error:
        parser.exit(1, f"{error}; the plot needs it: pip install matplotlib pandas\n")
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    print(output)


if __name__ == "__main__":
    main()
