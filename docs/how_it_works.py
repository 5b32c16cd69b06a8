"""Draw docs/how_it_works.png, the README's picture of the algorithm: `python docs/how_it_works.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "0.45"


def box(
    ax: plt.Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    color: str,
    alpha: float = 0.15,
    fontsize: float = 10,
) -> None:
    """A rounded box with its text; x, y are the lower left corner."""
    style = "round,pad=0.02,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, alpha=alpha, linewidth=0))
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor="none", edgecolor=color, linewidth=1.4)
    )
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=fontsize)


def arrow(ax: plt.Axes, start: tuple[float, float], end: tuple[float, float], curve: float = 0.0) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={curve}",
            arrowstyle="-|>",
            mutation_scale=14,
            color=GREY,
            linewidth=1.4,
        )
    )


def main() -> None:
    fig, ax = plt.subplots(figsize=(10, 4.6), layout="constrained")
    ax.set(xlim=(0, 10), ylim=(0, 4.6))
    ax.axis("off")

    box(ax, 0.2, 2.75, 2.5, 1.25, "online critics $Q_k$\n(policy evaluation:\nTD learning under $\\pi_k$)", ORANGE)
    arrow(ax, (2.75, 3.4), (3.55, 3.4))
    ax.text(3.15, 3.55, "freeze", ha="center", fontsize=9, color=GREY)

    # The stack: newest critic on the left, weights falling with age
    ax.text(5.35, 4.3, "stack of frozen critics (at most $M$)", ha="center", fontsize=10, color=BLUE)
    labels = ["$Q_k$", "$Q_{k-1}$", "$Q_{k-2}$", "…", "$Q_{k-M+1}$"]
    for i, label in enumerate(labels):
        box(ax, 3.65 + 0.7 * i, 3.05, 0.6, 0.75, label, BLUE, alpha=0.35 * 0.7**i, fontsize=8.5)
        ax.add_patch(plt.Rectangle((3.8 + 0.7 * i, 2.25), 0.3, 0.65 * 0.7**i, color=BLUE, alpha=0.6))
    ax.text(3.6, 2.45, "weight", ha="right", fontsize=9, color=BLUE)
    for i, weight in enumerate([r"$1$", r"$\beta$", r"$\beta^2$", "", r"$\beta^{M-1}$"]):
        ax.text(3.95 + 0.7 * i, 2.05, weight, ha="center", fontsize=9, color=BLUE)
    arrow(ax, (7.1, 3.4), (7.75, 3.4))
    box(ax, 7.8, 3.05, 2.0, 0.75, "$Q_{k-M}$ is deleted,\nits term is subtracted", GREY, alpha=0.08)

    arrow(ax, (5.35, 1.95), (5.35, 1.3))
    ax.text(5.5, 1.62, r"weighted sum $\times$ scale = logits $\xi_{k+1}$", fontsize=9, color=GREY, va="center")
    box(ax, 4.0, 0.45, 2.7, 0.75, r"policy $\pi_{k+1} = \mathrm{softmax}(\xi_{k+1})$", GREEN)
    arrow(ax, (3.95, 0.82), (2.75, 0.82))
    ax.text(3.35, 0.95, "acts", ha="center", fontsize=9, color=GREY)
    box(ax, 0.2, 0.45, 2.5, 0.75, "environments,\nreplay buffer", GREY, alpha=0.08)
    arrow(ax, (1.45, 1.25), (1.45, 2.7))
    ax.text(1.6, 1.95, "transitions", fontsize=9, color=GREY, va="center")
    path = Path(__file__).with_suffix(".png")
    fig.savefig(path, dpi=110)
    print(path.name)


if __name__ == "__main__":
    main()
