"""The comparison suites on a Ray cluster."""

import csv
import importlib.util
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.cell import run_cell
from benchmarks.results import Results
from benchmarks.suites import load_suites, make_cells

ROOT = Path(__file__).parents[1]
# Read by Ray when it is imported. Nobody else may use the cluster, and its processes have the priority of other tests
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=uuid.uuid4().hex, RAY_worker_niceness="0")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the package ray")

TINY_SUITE = """
tiny:
  description: Cells that work and one that fails.
  algos: [staq]
  seeds: [0, 1]
  n_eval_episodes: 2
  envs:
    CartPole-v1: {steps: 1200, eval_freq: 400, random: 20, reference: 500}
    Missing-v0: {steps: 1200, eval_freq: 400, random: 0, reference: 1}
"""


def error_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """The last line that the command prints before it gives up."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", "run", "smoke", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    return capsys.readouterr().err.splitlines()[-1]


@needs_ray
@pytest.mark.parametrize(
    "address, problem",
    [
        ("nonsense", "not an address"),
        ("host:99999", "Port out of range"),
        ("other://127.0.0.1:6379", "not an address"),
        ("127.0.0.1:1", "refused"),
        ("ray://127.0.0.1:1", "refused"),
    ],
)
def test_bad_addresses(
    address: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    error = error_of(["--ray", address], monkeypatch, capsys)
    assert f"--ray {address!r}: " in error and problem in error and 'accepted: "auto"' in error and "HOST:PORT" in error


def test_ray_is_optional(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # type: ignore[arg-type]
    assert 'pip install "sb3-staq[ray]"' in error_of(["--ray", "auto"], monkeypatch, capsys)
    assert "--ray" in error_of(["--shared"], monkeypatch, capsys)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster of two nodes with one core each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    yield cluster
    cluster.shutdown()


def rows_without_seconds(path: Path) -> list[dict[str, str]]:
    """The rows of a result file without the columns that differ between two runs."""
    rows = csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#"))
    return [{column: value for column, value in row.items() if "seconds" not in column} for row in rows]


@needs_ray
@pytest.mark.slow
def test_cells_survive_the_loss_of_a_node(cluster: Any, tmp_path: Path) -> None:
    suites_file = tmp_path / "suites.yml"
    suites_file.write_text(TINY_SUITE)
    command = [sys.executable, "-m", "benchmarks", "run", "tiny", "--suites", str(suites_file)]
    command += ["--folder", str(tmp_path / "ray"), "--ray", cluster.address]

    def output() -> str:
        return (tmp_path / "log.txt").read_text()

    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen([*command, "--envs", "CartPole-v1"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        # One core a node: when both cells are running, one of them is on the second node
        while not re.search(r"staq 0 running.*staq 1 running|staq 1 running.*staq 0 running", output(), re.DOTALL):
            assert process.poll() is None, output()
            time.sleep(0.1)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        process.wait(timeout=200)
    assert process.returncode == 0 and "\n2 done\n" in output(), output()
    assert "Task train_cell failed" in output() and "will be retried" in output()  # says Ray

    suite = load_suites(suites_file)["tiny"]
    remote, local = (make_cells(suite, env_ids=["CartPole-v1"], folder=tmp_path / name) for name in ("ray", "local"))
    for there, here in zip(remote, local, strict=True):
        run_cell(here, lambda *progress: None)
        assert rows_without_seconds(there.results_file) == rows_without_seconds(here.results_file)
        assert Results.read(there.results_file).metadata == Results.read(here.results_file).metadata
        assert not there.working_folder.exists()  # only the results travel

    # Once more, with a cell that fails: nothing is repeated
    before = remote[0].results_file.read_bytes()
    again = subprocess.run([*command, "--seeds", "0"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.returncode == 1 and again.stdout.splitlines()[-1] == "1 done, 1 failed"
    assert "CartPole-v1" in again.stdout and "running" not in again.stdout.split("CartPole-v1")[1].splitlines()[0]
    assert "Missing-v0 staq seed 0 failed" in again.stderr and "KeyError: 'Missing-v0'" in again.stderr
    assert remote[0].results_file.read_bytes() == before
