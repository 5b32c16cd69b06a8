"""The result file of a cell: one row per evaluation below a commented header, small enough to keep for good."""

import csv
import io
import json
import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sb3_staq.save_util import atomic_write

# The environment variable that says where the code is from that was sent to another machine without its clone
COMMIT_VARIABLE = "BENCHMARKS_COMMIT"
COLUMNS = ("evaluation", "step", "seconds", "cpu_seconds", "mean", "std", "returns")


@cache
def commit() -> str:
    """Return what git calls this code; empty without git or a clone, unless ``BENCHMARKS_COMMIT`` says it."""
    command, known = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"], ""
    with suppress(OSError):
        known = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return known or os.environ.get(COMMIT_VARIABLE, "")


@dataclass(frozen=True)
class Evaluation:
    """The returns of a policy."""

    step: int  # environment steps of training so far
    seconds: float  # wall-clock time so far, without evaluations and checkpoints
    cpu_seconds: float  # CPU time likewise, which excludes what other programs took; NaN if not known
    returns: list[float]  # of each episode
    final: bool = False  # whether it is the long evaluation after the training

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))


@dataclass
class Results:
    """The results of one cell so far."""

    metadata: dict[str, Any]  # the cell, its settings, versions; anything that JSON can hold
    evaluations: list[Evaluation] = field(default_factory=list)  # in the order of their steps, the final one last

    @property
    def done(self) -> bool:
        """Whether the training and its final evaluation are complete."""
        return bool(self.evaluations) and self.evaluations[-1].final

    def write(self, path: Path) -> None:
        """Write all rows, or leave the file as it was."""
        text = io.StringIO()
        for key, value in self.metadata.items():
            text.write(f"# {key}: {json.dumps(value)}\n")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.evaluations:
            times = [f"{row.seconds:.2f}", f"{row.cpu_seconds:.2f}"]
            moments = [f"{row.mean:.6g}", f"{np.std(row.returns):.6g}"]
            returns = " ".join(f"{value:.6g}" for value in row.returns)
            writer.writerow(["final" if row.final else "training", row.step, *times, *moments, returns])
        with atomic_write(path) as file:
            file.write(text.getvalue().encode())

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read results from a file."""
        lines = path.read_text().splitlines()
        header = [line[2:].split(": ", 1) for line in lines if line.startswith("# ")]
        evaluations = [
            Evaluation(
                int(row["step"]),
                float(row["seconds"]),
                float(row.get("cpu_seconds", "nan")),  # older files do not have it
                [float(value) for value in row["returns"].split()],
                row["evaluation"] == "final",
            )
            for row in csv.DictReader(line for line in lines if not line.startswith("#"))
        ]
        return cls({key: json.loads(value) for key, value in header}, evaluations)
