"""The agents in ``trained_agents/`` load, and have the returns that their model cards state."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml

from sb3_staq import StaQ
from sb3_staq.export import export_policy

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


def skip_without(env_id: str) -> None:
    """Skip the test where an environment is not installed."""
    try:
        gym.make(env_id).close()
    except (gym.error.Error, ImportError) as error:
        pytest.skip(f"needs {env_id}: {error}")


@pytest.mark.parametrize("card", [pytest.param(card, id=card.parent.name) for card in CARDS])
def test_return(card):
    """Two means of independent episodes differ by less than four standard errors, and 2% for other processors."""
    from trained_agents.make import N_EPISODES as N_CARD
    from trained_agents.make import evaluate

    env_id, mean, std = read_card(card)
    skip_without(env_id)
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


ROBOT = """
import sys
sys.modules["torch"] = None  # an import of it would fail
import gymnasium as gym, numpy as np, onnxruntime
session, env = onnxruntime.InferenceSession(sys.argv[1]), gym.make(sys.argv[2])
(obs, _), total, done = env.reset(seed=0), 0.0, False
while not done:
    (actions,) = session.run(["action"], {"obs": obs[None].astype(np.float32)})
    obs, reward, *ends, _ = env.step(actions[0])
    total, done = total + float(reward), any(ends)
print(total)
"""


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["CartPole-v1", "LunarLander-v3", "HalfCheetah-v4", "Hopper-v4"])
def test_exported_agent(env_id, tmp_path):
    """One command exports an agent, and the file acts as the card says, in a process without PyTorch."""
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    skip_without(env_id)
    folder, file = FOLDER / "staq" / f"{env_id}_1", tmp_path / "policy.onnx"
    _, mean, std = read_card(folder / "README.md")
    subprocess.run([sys.executable, "-m", "sb3_staq.export", folder / f"{env_id}.zip", file], check=True, cwd=ROOT)
    robot = [sys.executable, "-c", ROBOT, file, env_id]
    output = subprocess.run(robot, check=True, stdout=subprocess.PIPE, text=True, cwd=tmp_path).stdout
    assert abs(float(output.split()[-1]) - mean) < 4 * std + 0.02 * abs(mean)


@pytest.mark.parametrize("card", [pytest.param(card, id=card.parent.name) for card in CARDS])
def test_export(card, tmp_path):
    """Whatever the size of the logits, and so of their rounding errors."""
    model = StaQ.load(card.parent / f"{card.parent.name.removesuffix('_1')}.zip", device="cpu")
    export_policy(model, tmp_path / "policy.pt")


def test_kept_critics(tmp_path):
    """All critics of the average give its policy; some of them give the softmax of their mean, as a file as well."""
    from trained_agents.make import keep_average

    model = StaQ("MlpPolicy", "CartPole-v1", memory_size=4, policy_kwargs=dict(net_arch=[8]), seed=0)
    stack, obs = model.policy.frozen_critics, th.randn(20, 4)
    for _ in range(50):
        for parameter in model.policy.critics.parameters():
            parameter.data += 0.1 * th.randn_like(parameter)
        stack.push(model.policy.critics, 0.5, 0.05)
    average = model.policy.logits(obs).detach()
    assert keep_average(stack, 60) == 8  # 15% of 50
    assert th.allclose(model.policy.logits(obs), average, rtol=1e-5)

    keep_average(stack, 3)
    assert sorted(stack.updates) == [43, 47, 50]  # a half rounds to the even number
    factor = stack.weights.scale * stack.weights.total
    mean = th.stack([model.policy.q_values(critics, obs) for critics in stack]).mean(dim=0)
    model.save(tmp_path / "model.zip")
    for eval_policy in ("average", "last"):
        policy = StaQ.load(tmp_path / "model.zip", eval_policy=eval_policy).policy
        assert th.allclose(policy.logits(obs), factor * mean, rtol=1e-4, atol=1e-4)
