"""README and documentation: their code runs, their links lead somewhere, and their tables are those of the code."""

import ast
import re
from pathlib import Path

import pytest
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_staq import StaQ
from sb3_staq.arguments import DEFAULTS

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
PAGES = [page for page in PAGES if "_build" not in page.parts]
MAX_STEPS = 1_100

pytestmark = pytest.mark.skipif(not (ROOT / "docs" / "conf.py").is_file(), reason="needs the checkout")


def snippets():
    for page in sorted(PAGES):
        for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)):
            yield pytest.param(code, id=f"{page.relative_to(ROOT)}-{i}")


@pytest.mark.parametrize("code", list(snippets()))
def test_snippet(code, tmp_path, monkeypatch):
    """With so few steps that it takes seconds."""
    monkeypatch.chdir(tmp_path)
    learn = OffPolicyAlgorithm.learn

    def learn_little(self, total_timesteps, *args, **kwargs):
        limit = MAX_STEPS if self.num_timesteps == 0 else 40
        return learn(self, min(total_timesteps, limit), *args, **kwargs)

    monkeypatch.setattr(OffPolicyAlgorithm, "learn", learn_little)
    exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})


def _anchors(page: Path) -> set[str]:
    """What headings and labels of a page can be linked by."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in sorted(PAGES)])
def test_links(page):
    """Links to files of the repository, and images."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), f"{link}: there is no such heading"


def test_included_files_exist():
    for page in PAGES:
        for path in re.findall(r"^```\{(?:literalinclude|include)\} (\S+)", page.read_text(), re.MULTILINE):
            assert (page.parent / path).is_file(), f"{page.name} includes {path}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def _table(section: str) -> list[list[str]]:
    """The rows of the first table below a heading of the algorithm page."""
    text = (ROOT / "docs" / "algorithm.md").read_text().split(f"## {section}\n")[1]
    rows = re.search(r"((?:^\|.*\|\n)+)", text, re.MULTILINE)[1].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_table_of_defaults():
    shown = {name.strip("`"): (default, box_default) for name, default, box_default in _table("Parameters")}
    assert shown.keys() == DEFAULTS.keys()
    for name, cells in shown.items():
        values = tuple(ast.literal_eval(cell.strip("`")) for cell in cells)
        assert values == DEFAULTS[name]


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_glossary_of_metrics(env):
    """Every metric that a training logs is explained."""
    logged = set()

    class Collector(KVWriter):
        def write(self, key_values, key_excluded, step=0):
            logged.update(key_values)

        def close(self):
            pass

    arguments = dict(learning_starts=50, policy_update_interval=50, policy_kwargs=dict(net_arch=[8]))
    if env == "Pendulum-v1":
        arguments["policy_kwargs"] = dict(net_arch=dict(pi=[8], qf=[8]))
    model = StaQ("MlpPolicy", env, train_freq=1, **arguments)
    model.set_logger(Logger(folder=None, output_formats=[Collector()]))
    model.learn(450, log_interval=1)
    explained = " ".join(row[0] for row in _table("Logged metrics"))
    own = {key for key in logged if key.startswith("train/") or key == "rollout/exploration_rate"}
    assert len(own) > 10
    assert own <= set(re.findall(r"`([^`]+)`", explained))
