"""The result file of a cell: one row per evaluation below a commented header, small enough to be kept for good."""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sb3_staq.save_util import atomic_write

COLUMNS = ("evaluation", "step", "seconds", "cpu_seconds", "mean", "std", "returns")


@dataclass(frozen=True)
class Evaluation:
    """
    The returns of a policy.

    :param step: environment steps of training so far
    :param seconds: wall-clock seconds of training so far, without evaluations and checkpoints
    :param cpu_seconds: likewise those of the processor, which do not count what other programs took; NaN if not known
    :param returns: return of each episode
    :param final: whether it is the long evaluation after the training
    """

    step: int
    seconds: float
    cpu_seconds: float
    returns: list[float]
    final: bool = False

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))


@dataclass
class Results:
    """
    What one cell has yielded so far.

    :param metadata: the cell, its settings, versions; anything that JSON can hold
    :param evaluations: in the order of their steps, the final one last
    """

    metadata: dict[str, Any]
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the training and its final evaluation are complete."""
        return bool(self.evaluations) and self.evaluations[-1].final

    def write(self, path: Path) -> None:
        """
        Write all rows, or leave the file as it was.

        :param path: the CSV file
        """
        text = io.StringIO()
        for key, value in self.metadata.items():
            text.write(f"# {key}: {json.dumps(value)}\n")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.evaluations:
            kind = "final" if row.final else "training"
            returns = " ".join(f"{value:.6g}" for value in row.returns)
            std = float(np.std(row.returns))
            times = [f"{row.seconds:.2f}", f"{row.cpu_seconds:.2f}"]
            writer.writerow([kind, row.step, *times, f"{row.mean:.6g}", f"{std:.6g}", returns])
        with atomic_write(path) as file:
            file.write(text.getvalue().encode())

    @classmethod
    def read(cls, path: Path) -> "Results":
        """
        :param path: the CSV file
        :return: what was written to it
        """
        lines = path.read_text().splitlines()
        header = [line[2:].split(": ", 1) for line in lines if line.startswith("# ")]
        rows = csv.DictReader(line for line in lines if not line.startswith("#"))
        return cls(
            {key: json.loads(value) for key, value in header},
            [
                Evaluation(
                    int(row["step"]),
                    float(row["seconds"]),
                    float(row.get("cpu_seconds", "nan")),  # older files do not have it
                    [float(value) for value in row["returns"].split()],
                    row["evaluation"] == "final",
                )
                for row in rows
            ],
        )
