"""
Run cells on a Ray cluster, which schedules them, repeats those whose node is lost and brings back the results.

The packages of this checkout are sent to the nodes; their requirements (``pip install ".[all]"``) must be installed
there. A cell works in a temporary folder of its node, so a repeated one starts from the beginning; if the nodes share
the folder of the results, it works there and continues from its last checkpoint.
"""

import logging
import socket
import tempfile
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError

from benchmarks.results import COMMIT_VARIABLE, Results, commit
from benchmarks.runner import ONE_THREAD, Job
from benchmarks.suites import Cell
from sb3_staq.save_util import atomic_write

ROOT = Path(__file__).parents[1]
RUNTIME_ENV = {
    "working_dir": str(ROOT),
    # "." is the folder itself, which the first pattern excludes, too
    "excludes": ["/*", "!/.", "!/benchmarks", "!/hyperparams", "!/sb3_staq", "/benchmarks/results", "/benchmarks/runs"],
    "env_vars": {**ONE_THREAD, COMMIT_VARIABLE: commit()},  # the clone's history stays here
}
# How often a cell may take its process or its node down before it counts as failed
MAX_RETRIES = 5


def connect(address: str) -> None:
    """Connect this process to a cluster; raise ``ConnectionError`` if there is none, or this is not an address."""
    try:
        if address != "auto":
            parts = urlsplit(f"//{address.removeprefix('ray://')}")
            if not parts.hostname or not parts.port:
                raise ValueError("not an address")
            # Ray itself would wait for minutes
            socket.create_connection((parts.hostname, parts.port), timeout=5).close()
        ray.init(address, runtime_env=RUNTIME_ENV, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ConnectionError(str(error)) from error


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Board:
    """Where the cells post their reports. If its node is lost, it restarts empty, and the next reports fill it."""

    def __init__(self) -> None:
        self.reports: dict[int, tuple[Any, ...]] = {}

    def post(self, index: int, *report: Any) -> None:
        """Post the report of a cell: its node, and its progress as in ``benchmarks.cell.Report``."""
        self.reports[index] = report

    def read(self) -> dict[int, tuple[Any, ...]]:
        """Return the last report of each cell that has sent one."""
        return self.reports


# A process of its own for each cell, as on a single machine
@ray.remote(num_cpus=1, max_retries=MAX_RETRIES, max_calls=1)
def train_cell(cell: Cell, index: int, board: Any, shared: bool) -> bytes:
    """Train a cell on a node, and return the result file."""
    node = ray.get_runtime_context().get_node_id()
    board.post.remote(index, node, 0, 0.0, None)
    from benchmarks.cell import run_cell  # takes seconds

    with tempfile.TemporaryDirectory() as folder:
        cell = cell if shared else replace(cell, folder=Path(folder))
        run_cell(cell, lambda *progress: board.post.remote(index, node, *progress))
        return cell.results_file.read_bytes()


def train_on_ray(jobs: list[Job], shared: bool) -> Generator[None, None, None]:
    """Train cells on the connected cluster; ``shared`` says that its nodes share the cells' folder."""
    board = Board.remote()  # type: ignore[attr-defined]
    reports: dict[int, tuple[Any, ...]] = {}
    tasks = {train_cell.remote(job.cell, index, board, shared): index for index, job in enumerate(jobs)}
    while tasks:
        ended, _ = ray.wait(list(tasks), timeout=1.0)
        reports.update(ray.get(board.read.remote()))
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for index in tasks.values():
            node, *progress = reports.get(index, (None,))
            jobs[index].state = "running" if node in nodes else "waiting"
            if node in nodes:
                jobs[index].step, jobs[index].seconds, jobs[index].last_return = progress
        for task in ended:
            job = jobs[tasks.pop(task)]
            try:
                contents = ray.get(task)
            except RayError as error:
                job.state, job.error = "failed", str(error)
                continue
            with atomic_write(job.cell.results_file) as file:
                file.write(contents)
            job.show(Results.read(job.cell.results_file))
            job.state = "done"
        yield
