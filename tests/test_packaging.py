"""Both kinds of install, each into an environment that sees the packages of this one; and what need not be there."""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIP_OPTIONS = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file() or importlib.util.find_spec("pip") is None, reason="needs the checkout and pip"
)


class Venv:
    """
    A virtual environment without pip, which falls back on the packages of the current environment.

    :param path: where to create it
    """

    def __init__(self, path: Path):
        venv.create(path, with_pip=False, symlinks=os.name != "nt")
        self.python = next(p for p in (path / "bin" / "python", path / "Scripts" / "python.exe") if p.exists())
        self.site_packages = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        # A path in a .pth file makes modules importable, but has no .pth files of its own processed
        inherited = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
        (self.site_packages / "inherited.pth").write_text("\n".join(inherited))
        self.untouched = self.files()

    def files(self) -> set[Path]:
        return {path for path in self.site_packages.rglob("*") if path.name != "__pycache__"}

    def run(self, *args: str, **env: str) -> str:
        """
        :param args: arguments for this environment's interpreter
        :param env: environment variables
        :return: what it printed, on both streams
        """
        return self._run([str(self.python), *args], **env)

    def pip(self, *args: str) -> str:
        return self._run([sys.executable, "-m", "pip", "--python", str(self.python), *args])

    def _run(self, command: list[str], **env: str) -> str:
        inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SB3_STAQ_NO_ZOO")}
        # Elsewhere than in the checkout, where the package could be imported without being installed
        cwd = ROOT.anchor
        result = subprocess.run(command, cwd=cwd, env={**inherited, **env}, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: builds leave files behind."""
    source = tmp_path_factory.mktemp("source") / "sb3-staq"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "logs", "benchmarks")
    shutil.copytree(ROOT, source, ignore=ignored)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", *PIP_OPTIONS, "--wheel-dir", str(directory), str(source)]
    subprocess.run(command, check=True)
    return next(directory.glob("*.whl"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, source: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Venv:
    environment = Venv(tmp_path_factory.mktemp(request.param) / "venv")
    what = [str(wheel)] if request.param == "wheel" else ["-e", str(source)]
    # Whatever pip sees is installed in the current environment
    environment.pip("install", *PIP_OPTIONS, "--ignore-installed", *what)
    return environment


def test_content_of_the_wheel(wheel: Path):
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {"sb3_staq/staq.py", "sb3_staq/py.typed", "sb3_staq/hyperparams/staq.yml"} <= files
    top_level = {file.split("/")[0] for file in files if ".dist-info/" not in file}
    assert top_level == {"sb3_staq", "sb3_staq_zoo.pth", "_sb3_staq_hook.py"}


def test_commands(installed: Venv):
    for module in ("rl_zoo3.train", "rl_zoo3.enjoy", "rl_zoo3.record_video"):
        assert "staq" in installed.run("-m", module, "--help")


def test_switched_off(installed: Venv):
    assert "staq" not in installed.run("-m", "rl_zoo3.train", "--help", SB3_STAQ_NO_ZOO="1")
    assert "staq" in installed.run("-m", "sb3_staq.zoo", "train", "--help", SB3_STAQ_NO_ZOO="1")


def test_hyperparameters_are_found(installed: Venv):
    code = "from sb3_staq.zoo import default_config; print(default_config().read_text())"
    assert "CartPole-v1" in installed.run("-c", code)


def test_start_up_imports_nothing(installed: Venv):
    code = "import sys; print(*sys.modules)"
    assert set(installed.run("-c", code).split()) == set(installed.run("-c", code, SB3_STAQ_NO_ZOO="1").split())


def test_isolated_from_a_broken_package(installed: Venv, tmp_path: Path):
    """RL Zoo3 works, with a warning, where ``import sb3_staq`` does not."""
    (tmp_path / "sb3_staq").mkdir()
    (tmp_path / "sb3_staq" / "__init__.py").write_text("raise OSError('broken')")
    output = installed.run("-m", "rl_zoo3.train", "--help", PYTHONPATH=str(tmp_path))
    assert "could not be registered" in output and "broken" in output
    assert "--trained-agent" in output and "staq," not in output


def test_uninstall_leaves_nothing(installed: Venv):
    """The last test of this module: it takes the fixture's package away."""
    assert installed.files() > installed.untouched
    installed.pip("uninstall", "--yes", "sb3-staq")
    assert installed.files() == installed.untouched
    assert "staq" not in installed.run("-m", "rl_zoo3.train", "--help")


def test_what_stable_baselines3_needs_is_enough(tmp_path: Path):
    """Importing, training, saving and loading work without what RL Zoo3 and the extras bring."""
    script = """
import sys

MISSING = ("sb3_contrib", "rl_zoo3", "optuna", "tqdm", "rich", "tensorboard", "matplotlib", "pandas", "yaml", "onnx")
sys.modules.update(dict.fromkeys(MISSING))
from sb3_staq import StaQ

model = StaQ("MlpPolicy", "Pendulum-v1", learning_starts=50).learn(400)
model.save("model.zip")
assert StaQ.load("model.zip", env=model.get_env()).learn(100).n_policy_updates == 4
try:
    model.distill()
except ImportError as error:
    assert 'pip install "sb3-staq[zoo]"' in str(error), error
else:
    raise AssertionError("tqdm is not missing")
"""
    subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
