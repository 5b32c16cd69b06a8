"""The scripts in ``examples/`` run, each with so few steps that it takes seconds."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from examples import record

EXAMPLES = Path(__file__).parent.parent / "examples"
# Environment steps: enough for a few policy updates where these are what the script is about
STEPS = dict(
    deploy=2_000,
    diagnostics=1_500,
    export_policy=1_500,
    lunar_lander=2_200,
    mujoco=400,
    vec_normalize=600,
)
NEEDS = {
    "atari": "ale_py",
    "deploy": "onnxruntime",
    "lunar_lander": "Box2D",
    "minatar_breakout": "minatar",
    "mujoco": "mujoco",
}
SLOW = {"atari", "deploy", "minatar_breakout"}  # more than 5 seconds
OWN_TESTS = {"demo", "export_policy", "record", "resume"}


def parameters():
    for path in sorted(EXAMPLES.glob("*.py")):
        if path.stem not in OWN_TESTS:
            yield pytest.param(path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])


def run(name: str, *arguments: str) -> None:
    """Run an example in this process, as ``python examples/NAME.py ARGUMENTS`` would."""
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    argv, sys.argv = sys.argv, [f"{name}.py", *arguments]
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = argv


@pytest.mark.parametrize("name", list(parameters()))
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(name, str(STEPS.get(name, 1_200)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_id, settings, largest_return",
    [("CartPole-v1", "net_arch=[64, 64]", 500), ("FrozenLake-v1", "Using 'default'", 1)],
)
def test_demo(env_id, settings, largest_return, tmp_path, monkeypatch, capsys):
    """It takes the tuned settings or the defaults, and all files that it names are there."""
    pytest.importorskip("pygame")
    monkeypatch.chdir(tmp_path)
    run("demo", "--env", env_id, "--steps", "1200")
    output = capsys.readouterr().out
    assert settings in output
    for what in ("Model", "Learning curve", "Video"):
        path = Path(re.search(rf"^{what}: +(\S+)", output, re.MULTILINE)[1])
        assert 0 < path.stat().st_size <= 2_000_000
    stated = float(re.search(r"Mean return over 20 evaluation episodes: (\S+)", output)[1])
    assert 0 <= stated <= largest_return

    run("record", "--env", env_id, "-f", "demo", "--seconds", "1")
    with Image.open(f"{env_id}.gif") as picture:
        assert picture.width == 300


def test_demo_without_rendering(tmp_path, monkeypatch, capsys):
    """Where nothing can be drawn, it says so, and the rest is done."""

    def fail(*args, **kwargs):
        raise ImportError("no pygame")

    monkeypatch.setattr(record, "record", fail)
    monkeypatch.chdir(tmp_path)
    run("demo", "--steps", "200")
    output = capsys.readouterr().out
    assert "none: ImportError('no pygame')" in output and "Mean return" in output


def test_demo_of_unknown_environment(capsys):
    with pytest.raises(SystemExit):
        run("demo", "--env", "CarPole-v1")
    assert "--env CarPole-v1: " in capsys.readouterr().err


def test_resume_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("resume", "1100")
    run("resume", "1500")
    assert "Training goes on from step 1100 " in capsys.readouterr().out


def test_export_acts_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("export_policy", str(STEPS["export_policy"]))
    assert "Same actions: True" in capsys.readouterr().out
