"""Tables and figures of :mod:`benchmarks.speed`, from its CSV files and from nothing else."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from benchmarks.report import markdown_table, save

FOLDER = Path(__file__).parent / "results" / "speed"
REPETITIONS = 3
PARTS = ("collect", "logits of the replay", "critic steps", "policy update")
COLORS = dict(zip(PARTS, sns.color_palette("colorblind", len(PARTS)), strict=True))
HATCHES = dict(zip(PARTS, ("", "//", "..", ""), strict=True))


def medians(table: pd.DataFrame, value: str) -> pd.Series:
    """
    :param table: measurements with a column ``repetition``
    :param value: what was measured
    :return: its medians over the repetitions, indexed by all other columns
    """
    keys = [column for column in table.columns if column not in (value, "repetition")]
    return table.groupby(keys, sort=False)[value].median()


def count_environments(n_envs: int) -> str:
    """
    :param n_envs: number of environments
    :return: the number and the noun
    """
    return f"{n_envs} environment{'s' if n_envs > 1 else ''}"


def case_name(way: str, n_envs: int) -> str:
    """
    :param way: "StaQ", "reference" or "floor"
    :param n_envs: number of environments
    :return: what tables and figures call it
    """
    return f"{way}, {count_environments(n_envs)}"


def plot_iteration(iteration: pd.DataFrame) -> Figure:
    """
    :param iteration: measurements
    :return: the figure: the parts of an iteration over M, one panel per way and number of environments
    """
    seconds = medians(iteration[iteration["env"] == "synthetic"], "seconds").droplevel("env")
    cases = sorted(seconds.index.droplevel(["M", "part"]).unique(), key=lambda case: (case[0] == "StaQ", case))
    figure, axes = plt.subplots(1, len(cases), figsize=(5 * len(cases), 4.8), sharey=True)
    for ax, (way, n_envs) in zip(axes, cases, strict=True):
        parts = seconds.xs((way, n_envs), level=("way", "n_envs")).unstack("part")
        bottom = np.zeros(len(parts))
        for part in PARTS:
            ax.bar(
                parts.index.astype(str), parts[part], 0.7, bottom, label=part, color=COLORS[part], hatch=HATCHES[part]
            )
            bottom += parts[part].to_numpy()
        for x, total in enumerate(bottom):
            ax.text(x, total, f"{total:.0f}", ha="center", va="bottom")
        ax.set(title=case_name(way, n_envs), xlabel="M (frozen ensembles of two critics)")
        ax.grid(axis="x", visible=False)
    axes[0].set_ylabel("time of one iteration (s)")
    axes[0].set_ylim(top=1.1 * axes[0].get_ylim()[1])  # room for the numbers
    figure.suptitle("One iteration: 5,000 environment steps (which take no time themselves) and 5,000 gradient steps")
    figure.tight_layout()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(PARTS))
    return figure


def plot_acting(acting: pd.DataFrame, floors: dict[int, dict[str, float]]) -> Figure:
    """
    :param acting: measurements
    :param floors: milliseconds of the floors by batch size and name
    :return: the figure: time of a pass over the batch size
    """
    milliseconds = medians(acting, "ms").droplevel(["bytes", "flops"])
    figure, ax = plt.subplots(figsize=(7, 4.8))
    batch_sizes = list(floors)
    palette = sns.color_palette("colorblind")
    for (way, marker), color in zip({"reference": "s", "StaQ": "o"}.items(), palette, strict=False):
        ax.plot(batch_sizes, milliseconds[way][batch_sizes], marker=marker, color=color, label=way, linewidth=2)
    styles = {"floor": ("--", "floor: reading, or large matmul"), "narrow": (":", "floor: matmul of that batch size")}
    for name, (line, label) in styles.items():
        ax.plot(batch_sizes, [floor[name] for floor in floors.values()], color="0.3", linestyle=line, label=label)
    ax.set(xscale="log", yscale="log", xlabel="batch (observations)", ylabel="time of one pass (ms)")
    ax.set_xticks(batch_sizes, [str(size) for size in batch_sizes])
    ax.set_title("A pass through the full stack")
    ax.legend()
    figure.tight_layout()
    return figure


def acting_floors(acting: pd.DataFrame, machine: pd.DataFrame) -> dict[int, dict[str, float]]:
    """
    :param acting: measurements
    :param machine: measurements
    :return: by batch size, in milliseconds: the time to read the weights, to compute at the rate of a large matmul, the
        larger of the two ("floor"), and the same with the rate of a matmul with as few rows ("narrow")
    """
    rates = medians(machine, "value").droplevel("unit")
    floors = {}
    for batch_size, rows in acting.groupby("batch_size"):
        n_bytes, flops = rows["bytes"].iloc[0], rows["flops"].iloc[0]
        read, compute = n_bytes / rates["reading"] / 1e6, flops / rates["large matmul"] / 1e6
        narrow = flops / rates[f"matmul with {batch_size} rows"] / 1e6
        floor = max(read, compute)
        floors[batch_size] = {"read": read, "compute": compute, "floor": floor, "narrow": max(floor, narrow)}
    return floors


def iteration_floors(acting: pd.DataFrame, machine: pd.DataFrame, sizes: dict[str, Any]) -> dict[int, dict[str, float]]:
    """
    The least that an iteration with a full stack can take: in acting and for the cache only the matrix products, at the
    rates that the library reaches for products of their shapes, and reading the weights; in gradient steps only their
    operations.

    :param acting: measurements
    :param machine: measurements
    :param sizes: how much was measured
    :return: by number of environments: seconds of each part
    """
    rates = medians(machine, "value").droplevel("unit")
    flops_per_state = 2 * acting["bytes"].iloc[0] / 4 / max(sizes["memory_sizes"])  # of an ensemble
    cache = 2 * sizes["buffer_size"] * flops_per_state / rates["large matmul"] / 1e9
    return {
        n_envs: {
            "collect": sizes["iteration"] / n_envs * floor["narrow"] / 1000,
            "logits of the replay": cache,
            "critic steps": sizes["iteration"] * rates["operations of a gradient step"] / 1000,
            "policy update": 0.0,
        }
        for n_envs, floor in acting_floors(acting, machine).items()
        if n_envs in sizes["n_envs"]
    }


def iteration_section(iteration: pd.DataFrame, floors: dict[int, dict[str, float]], sizes: dict[str, Any]) -> list[str]:
    """
    :param iteration: measurements
    :param floors: of :func:`iteration_floors`
    :param sizes: how much was measured
    :return: the section
    """
    seconds = medians(iteration, "seconds").unstack("part")[list(PARTS)]
    seconds["whole"] = seconds.sum(axis=1)
    largest, smallest = max(sizes["memory_sizes"]), min(sizes["memory_sizes"])
    tables, training = [], seconds["logits of the replay"] + seconds["critic steps"]
    for env in iteration["env"].unique():
        rows = {}
        for (way, _, memory_size, n_envs), parts in seconds.xs(env, level="env", drop_level=False).iterrows():
            speedup = seconds.loc["reference", env, memory_size, 1]["whole"] / parts["whole"]
            cells = [f"{value:.2f}" for value in parts]
            rows[f"{case_name(way, n_envs)}, M = {memory_size}"] = [*cells, f"{speedup:.1f}"]
        if env == "synthetic":
            for n_envs, floor in floors.items():
                values = [*floor.values(), sum(floor.values())]
                speedup = seconds.loc["reference", env, largest, 1]["whole"] / values[-1]
                cells = [f"{value:.2f}" for value in values]
                rows[f"{case_name('floor', n_envs)}, M = {largest}"] = [*cells, f"{speedup:.1f}"]
        tables += [
            f"Environment: {env}",
            markdown_table(["", *(f"{part} (s)" for part in PARTS), "whole (s)", "reference / this"], rows),
        ]
    ratios = [
        f"{training['StaQ', 'synthetic', largest, n] / training['StaQ', 'synthetic', smallest, n]:.2f} "
        f"({count_environments(n)})"
        for n in sizes["n_envs"]
    ]
    return [
        "## One iteration",
        f"5,000 environment steps, 5,000 gradient steps (batch 256), one policy update; replay of "
        f"{sizes['buffer_size']:,} states, two critics 17-256-256-13, full stack. The synthetic environment has "
        "HalfCheetah's sizes and takes no time itself. Collecting is measured over "
        f"{sizes['n_collect']} steps, the critic over {sizes['n_gradient_steps']} gradient steps, and the reference's "
        f"evaluation of the replay over {sizes['n_reevaluated']} states, all scaled up linearly; the rest is measured "
        "whole.",
        "The reference way is our own compact one: one environment, each layer of all critics in one batched matrix "
        "product, and the whole replay through the whole stack at each iteration. Its gradient steps are ours. The "
        "floors are the matrix products alone, at the rates below for products of their shapes, and the reading of the "
        "weights; of gradient steps, their operations one after the other, without autograd, sampling and logging. "
        "This is what PyTorch, NumPy and the machine forbid to undercut.",
        "![Time of one iteration over M](iteration.png)",
        *tables,
        f"Training (logits of the replay and critic steps) at M = {largest} over that at M = {smallest}: "
        f"{', '.join(ratios)}.",
    ]


def acting_section(acting: pd.DataFrame, machine: pd.DataFrame, sizes: dict[str, Any]) -> list[str]:
    """
    :param acting: measurements
    :param machine: measurements
    :param sizes: how much was measured
    :return: the section
    """
    milliseconds = medians(acting, "ms").droplevel(["bytes", "flops"])
    rows = {}
    for batch_size, floor in acting_floors(acting, machine).items():
        reference, ours = milliseconds["reference", batch_size], milliseconds["StaQ", batch_size]
        values = [reference, ours, floor["read"], floor["compute"]]  # a GPU takes fractions of a millisecond
        ratios = [ours / floor["floor"], ours / floor["narrow"], reference / ours]
        rows[f"batch {batch_size}"] = [*(f"{v:.3g}" for v in values), *(f"{r:.2f}" for r in ratios)]
    rates = {f"{what} ({unit})": [f"{value:.1f}"] for (what, unit), value in medians(machine, "value").items()}
    return [
        "## Acting",
        f"One pass through {2 * max(sizes['memory_sizes'])} critics. The floor is the larger of the times to read all "
        "weights once and to do the multiplications at the rate of a large matrix product. The narrow floor takes the "
        "rate that the library reaches for products with as few rows as the batch has (600 matrices of 256 x 256 "
        "weights, the fastest of several ways): the matrix products of a pass, and nothing else.",
        markdown_table(
            [
                "", "reference (ms)", "StaQ (ms)", "read the weights (ms)", "multiply (ms)",
                "StaQ / floor", "StaQ / narrow floor", "reference / StaQ",
            ],
            rows,
        ),
        "![Time of a pass over the batch size](acting.png)",
        "What this machine does, measured in the same run:",
        markdown_table(["", "median"], rates),
    ]  # fmt: skip


def training_sections(
    steps: pd.DataFrame, gradient_steps: pd.DataFrame, floors: dict[int, dict[str, float]], sizes: dict[str, Any]
) -> list[str]:
    """
    :param steps: measurements
    :param gradient_steps: measurements
    :param floors: of :func:`iteration_floors`
    :param sizes: how much was measured
    :return: the sections about other algorithms, gradient steps, ``torch.compile`` and bf16
    """
    rates = medians(steps, "steps_per_second")
    rows = {}
    for (algo, env, n_envs), rate in rates.items():
        rival = "SAC" if ("SAC", env, 1) in rates else "DQN"
        rows[f"{env}: {case_name(algo, n_envs)}"] = [f"{rate:.0f}", f"{rate / rates[rival, env, 1]:.2f}"]
    limits = [
        f"{sizes['iteration'] / (floor['collect'] + floor['critic steps']):.0f} with {count_environments(n_envs)}"
        for n_envs, floor in floors.items()
    ]
    milliseconds = medians(gradient_steps, "ms")
    gradient_rows = {
        f"{what}: {how}": [f"{value:.2f}", f"{value / milliseconds[what].iloc[0]:.2f}"]
        for (what, how), value in milliseconds.items()
    }
    return [
        "## Beside SAC and DQN",
        f"Environment steps per second of `learn` over {sizes['n_steps']} steps, one gradient step per environment "
        f"step (batch 256, networks 256-256, full replay of {sizes['buffer_size']:,}); StaQ with a full stack, a "
        "policy update every 500 steps, HalfCheetah's actions on the axis grid. The floors above allow no more than "
        f"{', '.join(limits)}, whatever the environment takes. The default arguments of a `Box` are the settings of "
        "the MuJoCo tasks: joint critics, batches of 128, a policy update every 100 steps.",
        markdown_table(["", "steps per second", "ratio"], rows),
        "## Gradient steps",
        'CartPole-v1, batch 256, networks 256-256. The cache\'s pass is over 4,096 states. "Products in bf16" is '
        '`torch.set_float32_matmul_precision("medium")`: inputs of matrix products are rounded, all else is float32. '
        "Ratios are to the first line of a kind.",
        markdown_table(["", "ms", "ratio"], gradient_rows),
    ]


def interval_section(interval: pd.DataFrame, sizes: dict[str, Any]) -> list[str]:
    """
    :param interval: measurements
    :param sizes: how much was measured
    :return: the section
    """
    seconds = medians(interval, "seconds").unstack("part")
    steps, logits, newest = (seconds[part] for part in ("gradient steps", "logits of the replay", "the newest only"))
    columns = (steps, logits, logits / steps, newest, newest / steps)
    rows = {critic: [f"{column[critic]:.2f}" for column in columns] for critic in seconds.index}
    return [
        "## Frequent policy updates",
        f"What lies between two policy updates that are {sizes['interval']} steps apart, with M = "
        f"{max(sizes['memory_sizes'])} and a full replay of {sizes['interval_buffer_size']:,}: {sizes['interval']} "
        f"gradient steps (measured over {sizes['n_gradient_steps']}, batch 256, two critics 256-256, HalfCheetah's six "
        "groups of five values), and the update of all stored logits. The stack of joint critics has one network per "
        "entry, that of additive ones two. A deleted entry of negligible weight (with the default coefficients) is not "
        "evaluated.",
        markdown_table(
            ["critic", "gradient steps (s)", "logits of the replay (s)", "ratio", "the newest only (s)", "ratio"], rows
        ),
    ]


def memory_section(memory: pd.DataFrame) -> list[str]:
    """
    :param memory: measurements
    :return: the section
    """
    rows = {
        f"M = {row.M}": [*(f"{value / 1e6:.1f}" for value in row[2:]), f"{row.held / row.parameters:.3f}"]
        for row in memory.itertuples()
    }
    return [
        "## Memory",
        "Parameters of the frozen critics, the memory that holds them, and the saved model (without replay buffer).",
        markdown_table(["", "parameters (MB)", "held (MB)", "zip (MB)", "held / parameters"], rows),
    ]


def write_report(folder: Path, sizes: dict[str, Any], repetitions: int, note: str) -> Path:
    """
    :param folder: where the CSV files are, and where the report goes
    :param sizes: how much was measured
    :param repetitions: how often
    :param note: one more sentence
    :return: the Markdown file
    """
    tables = {path.stem: pd.read_csv(path) for path in folder.glob("*.csv")}
    iteration, acting, machine = tables["iteration"], tables["acting"], tables["machine"]
    floors = iteration_floors(acting, machine, sizes)
    sns.set_theme(style="whitegrid", context="notebook")
    save(plot_iteration(iteration), folder / "iteration.png")
    save(plot_acting(acting, acting_floors(acting, machine)), folder / "acting.png")
    command = "python -m benchmarks.speed"
    times = "CPU times of that thread, so that other programs take no part of them (but may take caches and bandwidth)"
    if sizes["device"] != "cpu":
        command += f" --device {sizes['device']}"
        times = "networks on the device, times until it has done all that was asked of it"
    if repetitions != REPETITIONS:
        command += f" --repetitions {repetitions}"
    if folder != FOLDER:
        command += f" --folder {folder}"
    text = [
        "# What StaQ costs",
        f"`{command}` writes this page, its figures and its CSV files. One thread, float32; "
        f"{times}; medians of {repetitions} repetitions, interleaved. {note}".rstrip(),
        *iteration_section(iteration, floors, sizes),
        *acting_section(acting, machine, sizes),
        *training_sections(tables["steps"], tables["gradient_steps"], floors, sizes),
        *interval_section(tables["interval"], sizes),
        *memory_section(tables["memory"]),
    ]
    report = folder / "report.md"
    report.write_text("\n\n".join(text) + "\n")
    return report
