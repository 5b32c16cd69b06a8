"""Draw the pictures of the documentation: `python -m docs.diagrams` writes docs/images."""

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from benchmarks.tabular import TabularStaQ
from benchmarks.tabular_mdps import MOVES, grid_cells, grid_world
from examples.record import load_agent, record

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "0.4"
IMAGES = Path(__file__).parent / "images"
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def box(ax, x, y, width, height, text, color, alpha=0.15, fontsize=10.0) -> None:
    """
    A rounded box with its text.

    :param ax: the axes
    :param x: left edge
    :param y: lower edge
    :param width: its width
    :param height: its height
    :param text: in its middle
    :param color: of its edge, and lighter of its face
    :param alpha: opacity of the face
    :param fontsize: of the text
    """
    style = "round,pad=0.02,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, alpha=alpha, linewidth=0))
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor="none", edgecolor=color, linewidth=1.4)
    )
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=fontsize)


def arrow(ax, start, end, curve=0.0, color=GREY) -> None:
    """An arrow between two points."""
    style = dict(connectionstyle=f"arc3,rad={curve}", arrowstyle="-|>", mutation_scale=14)
    ax.add_patch(FancyArrowPatch(start, end, color=color, linewidth=1.4, **style))


def canvas(width: float, height: float, bottom: float = 0.0) -> tuple[plt.Figure, plt.Axes]:
    """Axes without ticks, one unit an inch."""
    fig, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.set(xlim=(0, width), ylim=(bottom, bottom + height), aspect="equal")
    ax.axis("off")
    return fig, ax


def how_it_works() -> plt.Figure:
    """Critics are frozen on the stack; its weighted sum acts, its average is delivered."""
    fig, ax = canvas(10, 4.5, bottom=0.75)
    box(ax, 0.2, 3.45, 2.5, 1.25, "critics $Q_k$\n(policy evaluation:\nTD learning under $\\pi_k$)", ORANGE)
    arrow(ax, (2.75, 4.1), (3.55, 4.1))
    ax.text(3.15, 4.22, "freeze", ha="center", fontsize=9, color=GREY)

    # The stack: newest critic on the left, weights falling with age
    ax.text(5.35, 4.95, "stack of frozen critics", ha="center", color=BLUE)
    for i, label in enumerate(["$Q_k$", "$Q_{k-1}$", "$Q_{k-2}$", "…", "$Q_{k-M+1}$"]):
        box(ax, 3.65 + 0.7 * i, 3.75, 0.6, 0.75, label, BLUE, alpha=0.35 * 0.7**i, fontsize=8.5)
        ax.add_patch(Rectangle((3.8 + 0.7 * i, 2.95), 0.3, 0.65 * 0.7**i, color=BLUE, alpha=0.6))
    ax.text(3.6, 3.15, "weight", ha="right", fontsize=9, color=BLUE)
    for i, weight in enumerate([r"$1$", r"$\beta$", r"$\beta^2$", "", r"$\beta^{M-1}$"]):
        ax.text(3.95 + 0.7 * i, 2.75, weight, ha="center", fontsize=9, color=BLUE)
    arrow(ax, (7.1, 4.1), (7.75, 4.1))
    box(ax, 7.8, 3.75, 2.0, 0.75, "$Q_{k-M}$ is evicted,\nits term is subtracted", GREY, alpha=0.08)

    arrow(ax, (5.35, 2.65), (5.35, 2.0))
    ax.text(5.5, 2.32, r"weighted sum $\times$ scale = logits $\xi_{k+1}$", fontsize=9, color=GREY, va="center")
    box(ax, 3.75, 1.15, 3.2, 0.75, "$\\pi_{k+1} = \\mathrm{softmax}(\\xi_{k+1})$\nthe policy that learns", GREEN)
    arrow(ax, (3.7, 1.52), (2.75, 1.52))
    ax.text(3.22, 1.64, "collects", ha="center", fontsize=9, color=GREY)
    box(ax, 0.2, 1.15, 2.5, 0.75, "environments,\nreplay buffer", GREY, alpha=0.08)
    arrow(ax, (1.45, 1.95), (1.45, 3.4))
    ax.text(1.6, 2.65, "transitions", fontsize=9, color=GREY, va="center")

    arrow(ax, (7.3, 2.85), (8.75, 1.98), curve=-0.25)
    ax.text(8.55, 2.62, "plain average over the\nlast 15% of the updates", fontsize=9, color=GREY, va="center")
    box(ax, 7.55, 1.15, 2.3, 0.75, "average policy:\nwhat is delivered", RED)
    ax.text(8.7, 0.9, "predict, evaluation, saved models", ha="center", fontsize=9, color=GREY)
    return fig


def action_grids() -> plt.Figure:
    """The three grids of a Box with two dimensions."""
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.7), layout="constrained", sharey=True)
    values = np.linspace(-1, 1, 5)
    for ax, title, note in zip(
        axes,
        ['"factored" (default)', '"axis"', '"joint"'],
        [
            "d branches of 5 bins:\n2 softmaxes, 10 outputs",
            "1 branch of 2d+1 bins:\n5 outputs",
            "1 branch of 5$^d$ bins:\n25 outputs",
        ],
        strict=True,
    ):
        ax.set(title=title, xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal")
        ax.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1], xlabel=f"first dimension\n{note}")
        ax.grid(alpha=0.2)
    axes[0].set_ylabel("second dimension")
    for x, y in itertools.product(values, values):
        axes[0].plot(x, y, "o", color="0.85", markersize=6)
        axes[2].plot(x, y, "o", color=GREEN, markersize=7)
    axes[0].plot(values, np.full(5, -1.22), "s", color=BLUE, markersize=8, clip_on=False)
    axes[0].plot(np.full(5, -1.22), values, "s", color=ORANGE, markersize=8, clip_on=False)
    axes[0].plot(values[3], values[1], "o", color=GREEN, markersize=9)
    axes[0].plot([values[3]] * 2, [-1.22, values[1]], ":", color=BLUE)
    axes[0].plot([-1.22, values[3]], [values[1]] * 2, ":", color=ORANGE)
    for x, y in [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]:
        axes[1].plot(x, y, "o", color=GREEN, markersize=9)
    return fig


def main_effects() -> plt.Figure:
    """A critic of whole actions, the policy, and what an additive network can use of it."""
    values = np.linspace(-1, 1, 5)
    first, second = np.meshgrid(values, values, indexing="ij")
    q_values = 1.2 - 0.9 * (first - 0.3) ** 2 - 0.7 * (second + 0.2) ** 2 + 1.1 * first * second
    policies = [np.array([0.04, 0.08, 0.16, 0.32, 0.40]), np.array([0.05, 0.10, 0.20, 0.35, 0.30])]
    effects = [q_values @ policies[1], policies[0] @ q_values]

    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.5), layout="constrained", width_ratios=[1.2, 1, 1])
    mesh = left.pcolormesh(values, values, q_values.T, cmap="viridis", shading="nearest")
    fig.colorbar(mesh, ax=left)
    left.axhline(values[3], color="white", linestyle="--", linewidth=1.5)
    left.plot(values, np.full(5, values[3]), "o", color="white", markersize=6)
    left.set(title="critic of whole actions: $Q(s, a)$", xlabel="$a_1$", ylabel="$a_2$")
    shade = dict(facecolor="black", alpha=0.6, linewidth=0)
    left.text(-0.98, values[3] + 0.16, "one branch is swept", color="white", fontsize=9, bbox=shade)
    for ax, effect, policy, color, other, own in [
        (middle, effects[0], policies[0], BLUE, 2, 1),
        (right, effects[1], policies[1], ORANGE, 1, 2),
    ]:
        centred = effect - effect.mean()
        span = float(np.ptp(centred))
        ax.bar(values, centred, width=0.35, color=color, alpha=0.75)
        ax.axhline(0, color="0.6", linewidth=0.8)
        for x, probability in zip(values, policy, strict=True):
            ax.text(x, centred.min() - 0.2 * span, f"{probability:.2f}", ha="center", fontsize=8.5, color=GREY)
        ax.text(0, centred.min() - 0.36 * span, rf"probabilities $\pi_{own}$", ha="center", fontsize=8.5, color=GREY)
        ax.set(
            title=rf"$A_{own} = \mathbb{{E}}\,[\,Q \mid a_{own}\,]$, $a_{other}\sim\pi_{other}$",
            xlabel=f"$a_{own}$",
            xticks=values,
            ylim=(centred.min() - 0.45 * span, centred.max() + 0.1 * span),
        )
    middle.set_ylabel("main effect (centred)")
    return fig


def data_flow() -> plt.Figure:
    """Which file does what, and what flows between them."""
    fig, ax = canvas(10, 5.6)
    box(ax, 0.2, 4.45, 2.3, 0.85, "environments", GREY, alpha=0.08)
    box(ax, 3.85, 4.45, 2.5, 0.85, "replay buffer of SB3\n+ replay.py", BLUE)
    box(ax, 7.45, 4.45, 2.35, 0.85, "staq.py: train()\nsoft Bellman target", ORANGE)
    box(ax, 7.45, 2.55, 2.35, 0.95, "critics and targets\nq_networks.py\nmain_effects.py", ORANGE, fontsize=9.5)
    box(ax, 3.85, 2.55, 2.5, 0.95, "stack of frozen critics\nq_stack.py", BLUE)
    box(ax, 0.2, 2.55, 2.3, 0.95, "policies.py\naction_spaces.py", GREEN)
    box(ax, 3.85, 0.95, 2.5, 0.85, "mirror_descent.py\nweights, logits, softmax", GREEN)
    box(ax, 7.45, 0.95, 2.35, 0.85, "coefficients.py\nkl_coef, ent_coef", GREY, alpha=0.08)
    box(ax, 0.2, 0.95, 2.3, 0.85, "kernels.py\nbatched products", GREY, alpha=0.08)

    arrow(ax, (2.55, 4.88), (3.8, 4.88))
    ax.text(3.17, 5.0, "transitions", ha="center", fontsize=9, color=GREY)
    arrow(ax, (6.4, 4.88), (7.4, 4.88))
    ax.text(6.9, 5.0, "batch,", ha="center", fontsize=9, color=GREY)
    ax.text(6.9, 4.58, r"$\log\pi(\cdot|s')$", ha="center", fontsize=9, color=GREY)
    arrow(ax, (8.62, 4.4), (8.62, 3.55))
    ax.text(8.72, 3.97, "gradient steps", fontsize=9, color=GREY, va="center")
    arrow(ax, (7.4, 3.02), (6.4, 3.02))
    ax.text(6.9, 3.14, "push", ha="center", fontsize=9, color=GREY)
    arrow(ax, (3.8, 3.02), (2.55, 3.02))
    ax.text(3.17, 3.14, "logits", ha="center", fontsize=9, color=GREY)
    arrow(ax, (1.35, 3.55), (1.35, 4.4))
    ax.text(1.45, 3.97, "actions", fontsize=9, color=GREY, va="center")
    arrow(ax, (5.1, 3.55), (5.1, 4.4))
    ax.text(5.2, 3.97, r"weighted sums $S(s')$", fontsize=9, color=GREY, va="center")
    arrow(ax, (5.1, 1.85), (5.1, 2.5))
    ax.text(5.2, 2.17, "weights by age", fontsize=9, color=GREY, va="center")
    arrow(ax, (7.4, 1.37), (6.4, 1.37))
    ax.text(6.9, 1.49, r"$\eta, \tau$", ha="center", fontsize=9, color=GREY)
    arrow(ax, (2.55, 1.75), (3.8, 2.6))
    ax.text(3.3, 1.95, "products", fontsize=9, color=GREY, va="center")
    ax.text(0.2, 0.35, "Blue: the memory. Orange: what is trained. Green: what acts.", fontsize=9.5, color=GREY)
    return fig


MEMORY_SIZE, GROWTH = 40, (0, 1, 3, 10, 40)


def draw_policy(ax, staq: TabularStaQ) -> None:
    """Mean moves as arrows, in cells that are the darker the surer the policy is."""
    cells, log_pi = np.array(grid_cells()), staq.log_pi.numpy()
    entropy = -(np.exp(log_pi) * log_pi).sum(axis=1) / np.log(len(MOVES))
    n_rows, n_columns = 1 + cells.max(axis=0)
    ax.set(xlim=(-0.5, n_columns - 0.5), ylim=(n_rows - 0.5, -0.5), aspect="equal", xticks=[], yticks=[])
    ax.set_facecolor("0.35")  # walls
    for (row, column), sure in zip(cells, 1 - entropy, strict=True):
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="white", edgecolor="0.8", linewidth=0.5))
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=BLUE, alpha=0.6 * sure, linewidth=0))
    is_goal = (cells == cells.max(axis=0)).all(axis=1)
    ax.add_patch(Rectangle(cells[is_goal][0][::-1] - 0.5, 1, 1, color=ORANGE, linewidth=0))
    ax.text(*cells[is_goal][0][::-1], "goal", ha="center", va="center", fontsize=7)
    (rows, columns), (down, right) = cells[~is_goal].T, (np.exp(log_pi) @ np.array(MOVES))[~is_goal].T
    style = dict(pivot="mid", angles="xy", scale_units="xy", scale=1.2, width=0.012, headwidth=4, minlength=0.5)
    ax.quiver(columns, rows, right, down, color="0.1", **style)


def draw_weights(ax, staq: TabularStaQ) -> None:
    """The weights of the critics on the stack, newest first."""
    weights = staq.weights.values[::-1]
    ax.bar(range(len(weights)), weights, color=BLUE, alpha=0.7)
    ax.set(xlim=(-1, MEMORY_SIZE), ylim=(0, 1.05), xlabel="age of the critic", yticks=[0, 1])


def maze_after(n_updates: int) -> TabularStaQ:
    """StaQ in a maze, with exact policy evaluation."""
    staq = TabularStaQ(grid_world(gamma=0.95, slip=0.1), "weight_corrected", MEMORY_SIZE, kl_coef=3.0, ent_coef=0.3)
    for _ in range(n_updates):
        staq.update(staq.evaluate())
    return staq


def growing_stack() -> plt.Figure:
    """A policy gets sharper while its stack grows."""
    fig, axes = plt.subplots(
        2, len(GROWTH), figsize=(11, 3.1), layout="constrained", height_ratios=[2.2, 1], sharey="row"
    )
    for (maze, bars), n_updates in zip(axes.T, GROWTH, strict=True):
        staq = maze_after(n_updates)
        draw_policy(maze, staq)
        draw_weights(bars, staq)
        maze.set_title(f"{n_updates} critic{'s' * (n_updates != 1)}")
    axes[1, 0].set_ylabel("weight")
    return fig


def animate_growing_stack(path: Path) -> None:
    """The same as a moving picture."""
    fig, (maze, bars) = plt.subplots(1, 2, figsize=(7, 2.9), layout="constrained", width_ratios=[1.5, 1])

    def draw(n_updates: int) -> None:
        for ax in (maze, bars):
            ax.clear()
        staq = maze_after(n_updates)
        draw_policy(maze, staq)
        draw_weights(bars, staq)
        bars.set(ylabel="weight", title=f"critics on the stack: {n_updates}")
        maze.set_title("policy")

    frames = [*range(MEMORY_SIZE + 1), *[MEMORY_SIZE] * 8]
    FuncAnimation(fig, draw, frames=frames, init_func=lambda: None).save(path, writer=PillowWriter(fps=5), dpi=90)


def film_agents() -> None:
    """A moving picture of each agent in trained_agents."""
    folder = IMAGES.parent.parent / "trained_agents"
    for path in sorted(folder.glob("staq/*_1")):
        name = path.name.removesuffix("_1")
        env_id = name.replace("MinAtar-", "MinAtar/")
        record(*load_agent(folder, env_id, render=True), IMAGES / f"{name}.gif")
        print(f"images/{name}.gif")


def main() -> None:
    """Write all pictures."""
    IMAGES.mkdir(exist_ok=True)
    for draw in (how_it_works, action_grids, main_effects, data_flow, growing_stack):
        path = IMAGES / f"{draw.__name__}.png"
        draw().savefig(path, dpi=150)
        print(path.relative_to(IMAGES.parent))
    animate_growing_stack(IMAGES / "growing_stack.gif")
    film_agents()


if __name__ == "__main__":
    main()
