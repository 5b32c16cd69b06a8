"""Run cells in parallel and show their progress; on this machine, each in its own process."""

import multiprocessing as mp
import os
import shutil
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.results import Results
from benchmarks.suites import Cell

# One thread per run, also outside PyTorch
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
STATES = ("done", "running", "waiting", "failed", "outdated")
# On a terminal, there is a bar for each running cell
BARS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


@dataclass
class Job:
    """A cell and what is known about it."""

    cell: Cell
    state: str = "waiting"  # one of STATES
    step: int = 0  # environment steps so far
    seconds: float = 0.0  # wall-clock seconds of training so far
    last_return: float | None = None  # mean return of the last evaluation
    error: str = ""  # the traceback of a failed cell, or another message

    def show(self, results: Results) -> None:
        """Take over the progress from the results."""
        if results.evaluations:
            last = results.evaluations[-1]
            self.step, self.seconds, self.last_return = last.step, last.seconds, last.mean

    def __str__(self) -> str:
        cell, rate = self.cell, self.step / self.seconds if self.seconds > 0 else 0.0
        texts = [f"{cell.env_id} {cell.algo} {cell.seed} {self.state} {self.step:,} / {cell.steps:,}"]
        if rate:
            texts.append(f"{rate:,.0f}/s")
        if self.last_return is not None:
            texts.append(f"{self.last_return:.1f}")
        if self.state == "running" and rate:
            texts.append(str(timedelta(seconds=int(max(cell.steps - self.step, 0) / rate))))
        return " ".join(texts)


def look_up(cell: Cell, fresh: bool) -> Job:
    """Return a cell's job: waiting, done, outdated (deleted if ``fresh``), or failed if they cannot be read."""
    job = Job(cell)
    if not cell.results_file.exists():
        return job
    try:
        results, settings = Results.read(cell.results_file), cell.settings()
        different = [key for key in settings if results.metadata[key] != settings[key]]
    except Exception:
        job.state, job.error = "failed", traceback.format_exc()
        return job
    if different and fresh:
        # The results last: as long as they exist, the cell still counts as outdated
        shutil.rmtree(cell.working_folder, ignore_errors=True)
        cell.results_file.unlink()
        return job
    job.show(results)
    if different:
        job.state, job.error = "outdated", f"its results are of other {', '.join(different)}; --fresh replaces them"
    elif results.done:
        job.state = "done"
    return job


def _work(cell: Cell, connection: Connection) -> None:
    """Train a cell in its process, with all output in a file, and reports through the pipe."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
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
    """End with the parent: if killed, it cannot stop its processes, and the next run must not meet them."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# Trains the cells of the jobs and keeps the jobs up to date; yields whenever there may be something new to show
Train = Callable[[list[Job]], Generator[None, None, None]]


def train_locally(jobs: list[Job], n_jobs: int) -> Generator[None, None, None]:
    """Train cells on this machine, ``n_jobs`` at a time. Their processes are ended with it."""
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
                child_end.close()  # so that the pipe ends with the process
                job.state, running[parent_end] = "running", (job, process)
            ready: list[Any] = wait(list(running), timeout=1.0)
            for connection in ready:
                job, process = running[connection]
                try:
                    job.state, *report = connection.recv()
                except EOFError:  # no last message: the process was killed
                    process.join()
                    job.state, report = "failed", [f"The process ended with exit code {process.exitcode}"]
                if job.state == "running":
                    job.step, job.seconds, job.last_return = report
                else:
                    job.error = "".join(report)
                    process.join()
                    del running[connection]
            yield
    finally:
        for _, process in running.values():
            process.terminate()


def run_cells(cells: list[Cell], train: Train, fresh: bool = False) -> bool:
    """
    Run all cells that are not done, with a line for each new state and evaluation, and bars on a terminal.

    With ``fresh``, results of other settings are replaced. Returns whether all cells are done in the end.
    """
    jobs = [look_up(cell, fresh) for cell in cells]
    to_do = [job for job in jobs if job.state == "waiting"]
    shown = {id(job): ("waiting", job.last_return) for job in jobs}
    with Progress(*BARS, disable=not sys.stdout.isatty()) as progress, closing(train(to_do)) as news:
        bars = [progress.add_task(str(job.cell), total=job.cell.steps, visible=False) for job in to_do]
        while True:
            for job, bar in zip(to_do, bars, strict=True):
                progress.update(bar, completed=job.step, visible=job.state == "running")
            for job in jobs:
                if shown[id(job)] != (state := (job.state, job.last_return)):
                    shown[id(job)] = state
                    print(time.strftime("%H:%M:%S"), job, flush=True)
            if next(news, StopIteration) is StopIteration:
                break
    for job in jobs:
        if job.error:
            print(f"\n{job.cell} {job.state}:\n{job.error}", file=sys.stderr)
    counts = Counter(job.state for job in jobs)
    print(", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]), flush=True)
    return all(job.state == "done" for job in jobs)
