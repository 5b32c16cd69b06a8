"""The plot of the diagnostics shows what the file has, and says what keeps it from being drawn."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import RandomObsEnv, make_model
from matplotlib.image import imread

from sb3_staq.callbacks import DIAGNOSTICS_HEADER, PolicyUpdateDiagnostics
from sb3_staq.plotting import main, plot_diagnostics, read_diagnostics

CUSTOM = [2.0, -1.0, 0.0, 3.0]


@pytest.fixture(scope="module", params=["weight_corrected", "exact", CUSTOM], ids=str)
def log(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("diagnostics") / "log.csv"
    make_model(RandomObsEnv(), logit_rule=request.param).learn(120, callback=PolicyUpdateDiagnostics(path))
    return path


@pytest.mark.parametrize("n_lines", [1, 10])
def test_plot(log, n_lines, tmp_path, monkeypatch, capsys):
    """From the first policy update on; beside the file or where it is told to."""
    part = tmp_path / "part.csv"
    part.write_text("".join(log.read_text().splitlines(keepends=True)[: n_lines + 1]))
    for arguments, image in [([], tmp_path / "part.png"), (["-o", str(tmp_path / "b.png")], tmp_path / "b.png")]:
        monkeypatch.setattr(sys, "argv", ["plotting", str(part), *arguments])
        main()
        assert capsys.readouterr().out == f"{image}\n"
        pixels = imread(image)
        assert pixels.shape[:2] == (700, 1100)
        assert pixels.std() > 0.01


def test_what_the_plot_shows(log):
    data = read_diagnostics(log)
    figure = plot_diagnostics(data)
    kl, entropy, gap, by_age, colors = figure.axes
    for line in (*kl.lines, *entropy.lines, *gap.lines):
        np.testing.assert_array_equal(line.get_xdata(), data["policy_update"])
    np.testing.assert_array_equal(kl.lines[0].get_ydata(), data["kl"])
    np.testing.assert_array_equal(kl.lines[1].get_ydata(), data["lost_kl"].where(data["lost_kl"] > 0))
    np.testing.assert_array_equal(entropy.lines[0].get_ydata(), data["entropy"])
    np.testing.assert_array_equal(gap.lines[0].get_ydata(), data["action_gap"])
    shares = by_age.collections[0].get_array()
    for column, numbers in zip(shares.T, data["shares"], strict=True):
        np.testing.assert_array_equal(column.filled(0.0)[: len(numbers)], numbers)
    corners = by_age.collections[0].get_coordinates()  # of the cells, in whose middle policy update and age are whole
    np.testing.assert_array_equal(corners[0, :-1, 0] + 0.5, data["policy_update"])
    np.testing.assert_array_equal(corners[:-1, 0, 1] + 0.5, np.arange(len(shares)))
    assert "nats" in kl.get_ylabel()
    assert kl.get_yscale() == "log"
    for ax in (kl, entropy, gap, by_age):
        assert ax.get_title()
        assert ax.get_ylabel()
    assert gap.get_xlabel() == by_age.get_xlabel() == "policy update"
    assert colors.get_ylabel() == "share of the logits"


@pytest.mark.parametrize("problem", ["missing", "empty", "other", "matplotlib"])
def test_plot_that_cannot_be_drawn(problem, log, tmp_path, monkeypatch, capsys):
    path = tmp_path / "log.csv"
    text = {"missing": None, "empty": DIAGNOSTICS_HEADER, "other": "a,b\n", "matplotlib": log.read_text()}[problem]
    if text is not None:
        path.write_text(text)
    if problem == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(sys, "argv", ["plotting", str(path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "pip install matplotlib" in message if problem == "matplotlib" else "log.csv" in message


@pytest.mark.parametrize("log", ["exact"], indirect=True)
def test_command(log, tmp_path):
    """As a module, without a warning."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "sb3_staq.plotting", str(log)]
    subprocess.run([*command, "-o", str(tmp_path / "a.png")], check=True, capture_output=True)
    assert (tmp_path / "a.png").exists()
