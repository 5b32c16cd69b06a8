"""Runs cells side by side, each in a process of its own, and shows how far they are."""

import multiprocessing as mp
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from benchmarks.results import Results
from benchmarks.suites import Cell

# So many lines of finished cells stay in the table
N_RECENT = 8


@dataclass
class Job:
    """
    A cell and what is known of it.

    :param cell: the cell
    :param state: "waiting", "running", "done", "failed" or "outdated"
    :param step: environment steps so far
    :param seconds: wall-clock seconds of training so far
    :param last_return: mean return of the last evaluation
    :param error: the traceback of a failed cell, or what else has to be said
    :param process: the process of the cell once it has been started
    :param connection: where the process reports
    """

    cell: Cell
    state: str = "waiting"
    step: int = 0
    seconds: float = 0.0
    last_return: float | None = None
    error: str = ""
    process: Any = None
    connection: Any = None

    @property
    def rate(self) -> float:
        """Environment steps per second of training."""
        return self.step / self.seconds if self.seconds > 0 else 0.0

    def fields(self) -> list[str]:
        """What is shown of the cell, as in ``HEADINGS``."""
        remaining = max(self.cell.steps - self.step, 0)
        time_left = str(timedelta(seconds=int(remaining / self.rate))) if self.state == "running" and self.rate else ""
        return [
            self.cell.env_id,
            self.cell.algo,
            str(self.cell.seed),
            self.state,
            f"{self.step:,} / {self.cell.steps:,}",
            f"{self.rate:,.0f}/s" if self.rate else "",
            f"{self.last_return:.1f}" if self.last_return is not None else "",
            time_left,
        ]


HEADINGS = ("environment", "algorithm", "seed", "state", "steps", "rate", "last return", "time left")


def look_up(cell: Cell, fresh: bool) -> Job:
    """
    :param cell: the cell
    :param fresh: whether to delete what other settings have left behind
    :return: the cell's job: waiting, done or outdated, failed if its settings cannot be read
    """
    job = Job(cell)
    if not cell.results_file.exists():
        return job
    results = Results.read(cell.results_file)
    try:
        settings = cell.settings()
    except Exception:
        job.state, job.error = "failed", traceback.format_exc()
        return job
    different = [key for key in settings if results.metadata[key] != settings[key]]
    if different and fresh:
        remove(cell)
        return job
    if results.evaluations:
        last = results.evaluations[-1]
        job.step, job.seconds, job.last_return = last.step, last.seconds, last.mean
    if different:
        job.state, job.error = "outdated", f"its results are of other {', '.join(different)}; --fresh replaces them"
    elif results.done:
        job.state = "done"
    return job


def remove(cell: Cell) -> None:
    """
    Delete a cell's results and checkpoints, the results last: as long as they are there, the cell is known as outdated.

    :param cell: the cell
    """
    shutil.rmtree(cell.working_folder, ignore_errors=True)
    cell.results_file.unlink()


def _work(cell: Cell, connection: Connection) -> None:
    """What the process of a cell does: training, with all that is printed in a file, and reports through the pipe."""
    _die_with_parent()
    cell.working_folder.mkdir(parents=True, exist_ok=True)
    log = os.open(cell.working_folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.chdir(cell.working_folder)  # MuJoCo leaves a log behind
    try:
        from benchmarks.cell import run_cell  # takes seconds

        run_cell(cell, lambda *progress: connection.send(("running", *progress)))
        connection.send(("done",))
    except Exception:
        traceback.print_exc()
        connection.send(("failed", traceback.format_exc()))


def _die_with_parent() -> None:
    """A parent that is killed cannot stop its processes, and whoever starts again must not meet the old ones."""
    parent = mp.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Runner:
    """
    Runs all cells that are not done.

    :param cells: the cells
    :param n_jobs: number of cells at a time
    :param fresh: whether to replace results of other settings
    """

    def __init__(self, cells: list[Cell], n_jobs: int, fresh: bool = False):
        self.jobs = [look_up(cell, fresh) for cell in cells]
        self.n_jobs = n_jobs
        self.console = Console()
        self._shown: dict[int, tuple[Any, ...]] = {}

    def run(self) -> bool:
        """
        :return: whether all cells are done
        """
        # One thread a run, also outside PyTorch
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[variable] = "1"
        try:
            with self._display() as show:
                show()
                while self._start_jobs():
                    self._receive()
                    show()
        finally:
            for job in self._running():
                job.process.terminate()
        self._print_summary()
        return all(job.state == "done" for job in self.jobs)

    def _running(self) -> list[Job]:
        return [job for job in self.jobs if job.state == "running"]

    def _start_jobs(self) -> bool:
        """Start as many cells as there is room for; tell whether any are running."""
        waiting = [job for job in self.jobs if job.state == "waiting"]
        for job in waiting[: max(self.n_jobs - len(self._running()), 0)]:
            context = mp.get_context("spawn")
            job.connection, child_end = context.Pipe(duplex=False)
            job.process = context.Process(target=_work, args=(job.cell, child_end))
            job.process.start()
            child_end.close()  # so that the end of the process is the end of the pipe
            job.state = "running"
        return bool(self._running())

    def _receive(self) -> None:
        """Take in what the cells report."""
        jobs = {job.connection: job for job in self._running()}
        ready: list[Any] = wait(list(jobs), timeout=1.0)
        for connection in ready:
            job = jobs[connection]
            try:
                state, *report = connection.recv()
            except EOFError:  # no last word: the process was killed
                job.process.join()
                state, report = "failed", [f"The process ended with exit code {job.process.exitcode}"]
            if state == "running":
                job.step, job.seconds, job.last_return = report
                continue
            job.state, job.error = state, "".join(report)
            job.process.join()

    @contextmanager
    def _display(self) -> Iterator[Any]:
        """Gives the function that shows the cells: as a live table on a terminal, else as lines."""
        if not self.console.is_terminal:
            yield self._print_changes
            return
        with Live(console=self.console, auto_refresh=False) as live:
            yield lambda: live.update(self._table(), refresh=True)

    def _table(self) -> Group:
        """The cells that run or have ended, the latest ones, and the numbers of all."""
        table = Table(*HEADINGS, title="Cells")
        ended = [job for job in self.jobs if job.process is not None and job.state != "running"]
        colors = {"running": "cyan", "done": "green", "failed": "red"}
        for job in ended[-N_RECENT:] + self._running():
            table.add_row(*job.fields(), style=colors[job.state])
        return Group(table, self._counts())

    def _counts(self) -> str:
        states = ("done", "running", "waiting", "failed", "outdated")
        counts = {state: sum(job.state == state for job in self.jobs) for state in states}
        return ", ".join(f"{count} {state}" for state, count in counts.items() if count)

    def _print_changes(self) -> None:
        """One line for each cell whose state or last evaluation is new."""
        for job in self.jobs:
            news = (job.state, job.last_return)
            if job.state != "waiting" and self._shown.get(id(job)) != news:
                self._shown[id(job)] = news
                print(time.strftime("%H:%M:%S"), *(field for field in job.fields() if field), flush=True)

    def _print_summary(self) -> None:
        for job in self.jobs:
            if job.error:
                print(f"\n{job.cell} {job.state}:\n{job.error}", file=sys.stderr)
        print(self._counts(), flush=True)
