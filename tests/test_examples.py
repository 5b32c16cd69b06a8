"""The scripts in ``examples/`` run, each with so few steps that it takes seconds."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# Environment steps: enough for a few policy updates where these are what the script is about
STEPS = dict(
    demo=1_200,
    deploy=2_000,
    diagnostics=1_500,
    export_policy=1_500,
    lunar_lander=2_200,
    mujoco=400,
    vec_normalize=600,
)
NEEDS = {"deploy": "onnxruntime", "lunar_lander": "Box2D", "minatar_breakout": "minatar", "mujoco": "mujoco"}
SLOW = {"deploy", "minatar_breakout"}  # more than 5 seconds
OWN_TESTS = {"export_policy", "resume"}


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
    steps = str(STEPS.get(name, 1_200))
    run(name, *(["--steps", steps] if name == "demo" else [steps]))


def test_resume_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("resume", "1100")
    run("resume", "1500")
    assert "Training goes on from step 1100 " in capsys.readouterr().out


def test_export_acts_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("export_policy", str(STEPS["export_policy"]))
    assert "Same actions: True" in capsys.readouterr().out
