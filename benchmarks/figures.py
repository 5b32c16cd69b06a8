"""What the figures and tables of several benchmarks share."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart
BLUE, ORANGE, SKY, BLACK, PURPLE = "#0072B2", "#E69F00", "#56B4E9", "#000000", "#CC79A7"
VERMILLION, GREEN, YELLOW = "#D55E00", "#009E73", "#F0E442"


def share_legend(figure: Figure, ncols: int = 6) -> Figure:
    """Replace the legends of the panels by one above all of them, with every label once."""
    entries: dict[str, Any] = {}
    for ax in figure.axes:
        entries |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        if (legend := ax.get_legend()) is not None:
            legend.remove()
    figure.set_layout_engine("constrained")
    columns = min(len(entries), ncols)
    figure.legend(entries.values(), entries.keys(), ncols=columns, loc="outside upper center", frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Save a figure and close it."""
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def text_table(table: pd.DataFrame) -> str:
    """Format a table of texts in Markdown: texts unchanged, right-aligned except for the names of the rows."""
    alignment = ("left", *["right"] * table.shape[1])
    texts = table.astype(object).where(table.notna(), "").rename_axis("")
    return texts.to_markdown(disable_numparse=True, colalign=alignment)
