"""Runs cells side by side and shows how far they are; on this machine, each in a process of its own."""

import multiprocessing as mp
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from benchmarks.results import Results
from benchmarks.suites import Cell

# One thread a run, also outside PyTorch
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
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
    """

    cell: Cell
    state: str = "waiting"
    step: int = 0
    seconds: float = 0.0
    last_return: float | None = None
    error: str = ""

    @property
    def rate(self) -> float:
        """Environment steps per second of training."""
        return self.step / self.seconds if self.seconds > 0 else 0.0

    def show(self, results: Results) -> None:
        """
        :param results: where the training stands
        """
        if results.evaluations:
            last = results.evaluations[-1]
            self.step, self.seconds, self.last_return = last.step, last.seconds, last.mean

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
    job.show(results)
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


# Trains the cells of the jobs and keeps the jobs up to date; yields whenever there may be something new to show
Train = Callable[[list[Job]], Generator[None, None, None]]


def train_locally(jobs: list[Job], n_jobs: int) -> Generator[None, None, None]:
    """
    Train cells on this machine, see ``Train``. They end with this function, whatever ends it.

    :param jobs: jobs that are waiting
    :param n_jobs: number of cells at a time
    """
    os.environ.update(ONE_THREAD)
    context = mp.get_context("spawn")
    waiting = list(reversed(jobs))
    running: dict[Any, tuple[Job, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < n_jobs:
                job = waiting.pop()
                parent_end, child_end = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(job.cell, child_end))
                process.start()
                child_end.close()  # so that the end of the process is the end of the pipe
                job.state, running[parent_end] = "running", (job, process)
            for connection in wait(list(running), timeout=1.0):
                if _receive(*running[connection], connection) != "running":
                    del running[connection]
            yield
    finally:
        for _, process in running.values():
            process.terminate()


def _receive(job: Job, process: Any, connection: Any) -> str:
    """Take in what the process of a cell reports; gives the state of the cell."""
    try:
        state, *report = connection.recv()
    except EOFError:  # no last word: the process was killed
        process.join()
        state, report = "failed", [f"The process ended with exit code {process.exitcode}"]
    if state == "running":
        job.step, job.seconds, job.last_return = report
    else:
        job.state, job.error = state, "".join(report)
        process.join()
    return job.state


class Runner:
    """
    Runs all cells that are not done.

    :param cells: the cells
    :param train: trains those that are not done
    :param fresh: whether to replace results of other settings
    """

    def __init__(self, cells: list[Cell], train: Train, fresh: bool = False):
        self.jobs = [look_up(cell, fresh) for cell in cells]
        self.to_do = [job for job in self.jobs if job.state == "waiting"]
        self.train = train
        self.console = Console()
        self._shown: dict[int, tuple[Any, ...]] = {}

    def run(self) -> bool:
        """
        :return: whether all cells are done
        """
        with self._display() as show, closing(self.train(self.to_do)) as news:
            show()
            for _ in news:
                show()
        self._print_summary()
        return all(job.state == "done" for job in self.jobs)

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
        ended = [job for job in self.to_do if job.state in ("done", "failed")]
        running = [job for job in self.to_do if job.state == "running"]
        colors = {"running": "cyan", "done": "green", "failed": "red"}
        for job in ended[-N_RECENT:] + running:
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
            if self._shown.get(id(job), ("waiting", job.last_return)) != news:
                self._shown[id(job)] = news
                print(time.strftime("%H:%M:%S"), *(field for field in job.fields() if field), flush=True)

    def _print_summary(self) -> None:
        for job in self.jobs:
            if job.error:
                print(f"\n{job.cell} {job.state}:\n{job.error}", file=sys.stderr)
        print(self._counts(), flush=True)
