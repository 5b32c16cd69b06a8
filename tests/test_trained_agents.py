"""The agents in ``trained_agents/`` load, and have the returns that their model cards state."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "trained_agents"
CARDS = sorted(FOLDER.glob("staq/*/README.md"))
N_EPISODES = 5

pytestmark = pytest.mark.skipif(not CARDS, reason="needs the checkout: the agents are in no package")


def read_card(path: Path) -> tuple[str, float, float]:
    """The environment of a card, and mean and standard deviation of its returns."""
    result = yaml.safe_load(path.read_text().split("---\n")[1])["model-index"][0]["results"][0]
    mean, std = map(float, result["metrics"][0]["value"].split(" +/- "))
    return result["dataset"]["type"], mean, std


@pytest.mark.parametrize("card", [pytest.param(card, id=card.parent.name) for card in CARDS])
def test_return(card):
    """Two means of independent episodes differ by less than four standard errors, and 2% for other processors."""
    from trained_agents.make import N_EPISODES as N_CARD
    from trained_agents.make import evaluate

    env_id, mean, std = read_card(card)
    try:
        gym.make(env_id).close()
    except (gym.error.Error, ImportError) as error:
        pytest.skip(f"needs {env_id}: {error}")
    returns, _ = evaluate(FOLDER, env_id, N_EPISODES)
    tolerance = 4 * std * np.sqrt(1 / N_EPISODES + 1 / N_CARD) + 0.02 * abs(mean)
    assert abs(np.mean(returns) - mean) < tolerance


@pytest.mark.parametrize("card", [pytest.param(card, id=card.parent.name) for card in CARDS])
def test_files(card):
    """What the RL Zoo needs is there, and no more than 3 MB."""
    folder = card.parent
    env_name = folder.name.removesuffix("_1")
    assert (folder / f"{env_name}.zip").stat().st_size < 3_000_000
    assert {"config.yml", "args.yml"} <= {path.name for path in (folder / env_name).iterdir()}
