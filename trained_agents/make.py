"""Train an agent for this folder by the RL Zoo, keep what acts, evaluate it, and write its model card."""

import argparse
import platform
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch as th
import yaml
from huggingface_sb3 import EnvironmentName
from rl_zoo3.utils import get_latest_run_id
from stable_baselines3.common.evaluation import evaluate_policy

import sb3_staq
from examples.record import load_agent
from sb3_staq import StaQ
from sb3_staq.q_stack import FrozenCritics

FOLDER = Path(__file__).parent
MAX_BYTES = 3_000_000
N_EPISODES = 20
# Added to the card if the policy is "best"
BEST = ". It delivers the average that did best in the training's own trials"
PACKAGES = ("stable-baselines3", "rl_zoo3", "gymnasium", "torch", "numpy", "mujoco", "Box2D", "MinAtar")

CARD = """---
{metadata}---

# StaQ on {env}

| | |
|---|---|
| return | {mean:.2f} +/- {std:.2f} ({n} greedy episodes, {low:.2f} to {high:.2f}) |
| stack | {kept} critics of the average's {averaged}, of {n_networks} |
| return with all {averaged} | {full_mean:.2f} +/- {full_std:.2f} |
| trained by | `{command}` |
| commit | {commit} |
| versions | {versions} |

This is the model at the end of the training{note}. The file has only what acts: the critics of the delivered
average, without the rest of the stack and without optimizer state. So every `eval_policy` gives the same policy, and
training cannot go on from it.

See its return:

```bash
python -m rl_zoo3.enjoy --algo staq --env {env} -f trained_agents --no-render -n {steps}
```
"""


def keep_average(stack: FrozenCritics, size: int, eval_policy: str = "average") -> int:
    """
    Delete all critics but evenly spread ones of an average, which get equal weights.

    :param stack: is changed
    :param size: number of critics to keep at most
    :param eval_policy: the average that is delivered, "average" or "best"
    :return: number of critics that it had
    """
    state, coefs = stack.state_dict(), stack.coefs(eval_policy)
    averaged = coefs[:, 0].nonzero().flatten().tolist()
    averaged.sort(key=stack.updates.__getitem__)
    n = min(size, len(averaged))
    rows = [averaged[i] for i in np.linspace(0, len(averaged) - 1, n).round().astype(int)]
    kept = {}
    for new, old in enumerate(rows):
        kept |= {f"{new}.{name}": values.clone() for name, values in stack[old].state_dict().items()}
    weights = th.zeros(n, state["weights"].shape[1])  # a number in several parts
    weights[:, 0] = coefs.sum() / n
    if eval_policy == "best" and stack.marked["best"][0] > 0:  # becomes the present average
        state["constants"][2] = state["marked"][2]
    numbers = {"updates": state["updates"][rows], "constants": state["constants"], "marked": 0 * state["marked"]}
    stack.load_state_dict({**kept, "weights": weights, **numbers})
    return len(averaged)


def save(model: StaQ, path: Path) -> None:
    """
    Save a model without SB3's note on the machine that trained it.

    :param model: the model
    :param path: the zip file
    """
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != "system_info.txt"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def evaluate(folder: Path, env_id: str, n_episodes: int = N_EPISODES) -> tuple[list[float], int]:
    """
    Evaluate as ``rl_zoo3.enjoy`` does.

    :param folder: has the agent in ``staq/ENV_1``
    :param env_id: id of the environment
    :param n_episodes: number of greedy episodes, the first with seed 0
    :return: their returns, and the environment steps of all
    """
    model, env = load_agent(folder, env_id)
    returns, lengths = evaluate_policy(model, env, n_episodes, return_episode_rewards=True)
    return returns, sum(lengths)


def installed_versions() -> str:
    """The versions of what makes a difference."""
    found = [f"Python {platform.python_version()}", f"sb3-staq {sb3_staq.__version__}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    """Train and publish the agent of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("env", help="id of the environment")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--logs", default="logs", help="where the training goes")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the agent goes")
    parser.add_argument("--trained", action="store_true", help="take the newest training of --logs")
    parser.add_argument("--command", help="what trained it, for the card; by default what the RL Zoo has noted")
    parser.add_argument("--commit", help="of that training; by default the last one that changed the package")
    args = parser.parse_args()
    th.set_num_threads(1)

    if not args.trained:
        options = f"--algo staq --env {args.env} --seed {args.seed} --num-threads 1 --eval-freq -1 -f {args.logs}"
        subprocess.run([sys.executable, "-m", "rl_zoo3.train", *options.split()], check=True)

    name = EnvironmentName(args.env)
    source = Path(args.logs) / "staq" / f"{name}_{get_latest_run_id(str(Path(args.logs) / 'staq'), name)}"
    target = args.folder / "staq" / f"{name}_1"
    full, _ = evaluate(Path(args.logs), args.env)  # first, as it fails if the training has left no agent
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("command.txt"))
    command = args.command or " ".join(["python", *(source / name / "command.txt").read_text().split()[1:]])
    for size in (60, 45, 30, 20, 15, 10):
        model = StaQ.load(source / f"{name}.zip", device="cpu")
        averaged = keep_average(model.policy.frozen_critics, size, model.policy.eval_policy)
        model.policy.optimizer.state.clear()
        save(model, target / f"{name}.zip")
        if (target / f"{name}.zip").stat().st_size < MAX_BYTES:
            break

    returns, steps = evaluate(args.folder, args.env)
    mean, std = np.mean(returns), np.std(returns)
    metric = {"type": "mean_reward", "name": "mean_reward", "value": f"{mean:.2f} +/- {std:.2f}", "verified": False}
    task = {"type": "reinforcement-learning", "name": "reinforcement-learning"}
    result = {"task": task, "dataset": {"name": args.env, "type": args.env}, "metrics": [metric]}
    metadata = {
        "library_name": "stable-baselines3",
        "tags": [args.env, "deep-reinforcement-learning", "reinforcement-learning", "stable-baselines3"],
        "model-index": [{"name": "StaQ", "results": [result]}],
    }
    log = ["git", "log", "-1", "--format=%h", "--", "sb3_staq", "hyperparams"]
    commit = subprocess.run(log, cwd=FOLDER.parent, capture_output=True, text=True)
    card = CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        env=args.env,
        n=len(returns),
        mean=mean,
        std=std,
        low=min(returns),
        high=max(returns),
        note=BEST if model.eval_policy == "best" else "",
        n_networks="one network each" if model.critic == "joint" else f"{model.n_critics} networks each",
        kept=len(model.policy.frozen_critics),
        averaged=averaged,
        full_mean=np.mean(full),
        full_std=np.std(full),
        command=command,
        commit=args.commit or commit.stdout.strip(),
        versions=installed_versions(),
        steps=steps,
    )
    (target / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
