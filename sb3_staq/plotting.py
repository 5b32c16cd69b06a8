"""
Plots of what the callbacks write.

``python -m sb3_staq.plotting FILE [-o PNG]`` draws the file of a ``PolicyUpdateDiagnostics`` callback.
"""

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sb3_staq.callbacks import DIAGNOSTICS_HEADER, complete_lines

# Needed only to look at the file, not to train
if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def read_diagnostics(path: str | Path) -> "pd.DataFrame":
    """
    Read the diagnostics of a training.

    :param path: a file of :class:`PolicyUpdateDiagnostics`, complete or not
    :return: one row per policy update; ``shares`` holds arrays, one number per critic, newest first
    :raise ValueError: if it is another kind of file
    """
    import pandas as pd

    text = "".join([DIAGNOSTICS_HEADER, *complete_lines(path)])
    return pd.read_csv(io.StringIO(text), converters={"shares": lambda text: np.array(text.split(), dtype=float)})


def plot_diagnostics(data: "pd.DataFrame") -> "Figure":
    """
    Draw the diagnostics of a training.

    :param data: at least one policy update, as from :func:`read_diagnostics`
    :return: the figure
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Everybody can tell blue from orange, and dashes from lines in print as well
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
        ax.grid(color="0.9")
    for ax in axes[2:]:
        ax.set_xlabel("policy update")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_age.yaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{len(data)} policy updates, {data['step'].iloc[-1]:,} environment steps")
    return figure


def main() -> None:
    """Draw the file of a PolicyUpdateDiagnostics callback."""
    parser = argparse.ArgumentParser(prog="python -m sb3_staq.plotting", description=main.__doc__)
    parser.add_argument("file", type=Path, help="the CSV file; that of a running training is fine")
    parser.add_argument("-o", "--output", type=Path, help="the image; if not given, that of the CSV with .png")
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
