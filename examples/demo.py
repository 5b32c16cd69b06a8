"""Train StaQ on any environment, show the progress, evaluate, and keep the model, its learning curve and a video."""

import argparse
from pathlib import Path

import gymnasium as gym
import matplotlib
import numpy as np
import torch as th
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results

from examples.record import load_agent, record

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EVAL_SEED = 1_000_000  # far from the seed of the training
BLUE = "#0072B2"


def plot_learning_curve(folder: Path, title: str) -> Path:
    """
    Plot the returns over the steps.

    :param folder: folder with the training episodes (monitor.csv) and the evaluations (evaluations.npz)
    :param title: title of the figure
    :return: the figure's path
    """
    episodes = load_results(str(folder))
    evaluations = np.load(folder / "evaluations.npz")
    steps, returns = evaluations["timesteps"], evaluations["results"]
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    training = "training episodes (exploring)"
    ax.plot(episodes["l"].cumsum(), episodes["r"], ".", color="0.75", markersize=3, label=training)
    greedy = f"evaluation, greedy: mean of {returns.shape[1]} episodes"
    ax.plot(steps, returns.mean(axis=1), color=BLUE, linewidth=2, label=greedy)
    ax.fill_between(steps, returns.min(axis=1), returns.max(axis=1), color=BLUE, alpha=0.2, label="min to max")
    ax.set(title=title, xlabel="environment steps", ylabel="return of an episode")
    ax.legend(loc="best", frameon=False)
    ax.grid(color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    path = folder / "learning_curve.png"
    fig.savefig(path, dpi=120)
    return path


def main() -> None:
    """Train, evaluate and record an agent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="CartPole-v1", help="any id of Gymnasium")
    parser.add_argument("--steps", type=int, help="environment steps; those of the hyperparameter file by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where the results go")
    parser.set_defaults(env_kwargs=None)  # the RL Zoo looks for it in the saved arguments
    args = parser.parse_args()
    th.set_num_threads(1)  # small networks: more threads only get in each other's way
    try:
        gym.make(args.env).close()
    except (gym.error.Error, ImportError) as error:
        parser.error(f"--env {args.env}: {error}")

    # The settings of hyperparams/staq.yml: those of the environment, or its defaults
    manager = ExperimentManager(
        args,
        "staq",
        args.env,
        str(args.folder),
        n_timesteps=args.steps or -1,
        n_eval_episodes=5,
        seed=args.seed,
        log_interval=-2,
        verbose=0,
        show_progress=True,
    )
    steps = args.steps or int(manager.read_hyperparameters()[0]["n_timesteps"])
    manager.eval_freq = max(min(steps, 1000), steps // 20)
    model, _ = manager.setup_experiment()
    manager.learn(model)
    manager.save_trained_model(model)

    folder = Path(manager.save_path)
    exp_id = int(folder.name.rpartition("_")[2])  # another demo may have begun meanwhile
    model, env = load_agent(args.folder, args.env, EVAL_SEED, exp_id=exp_id)
    mean, std = evaluate_policy(model, env, n_eval_episodes=20)
    figure = plot_learning_curve(folder, f"StaQ on {args.env}, seed {args.seed}")
    try:
        video = folder / "video.gif"
        record(*load_agent(args.folder, args.env, EVAL_SEED, render=True, exp_id=exp_id), video)
    except Exception as error:  # of many kinds: the rendering libraries are optional
        video = f'none: {error!r} (drawing needs pip install ".[all]", and for MuJoCo without a screen libegl1)'
    print(f"Model:          {folder / manager.env_name}.zip ({len(model.policy.frozen_critics)} frozen critics)")
    print(f"Learning curve: {figure}")
    print(f"Video:          {video}")
    print(f"Mean return over 20 evaluation episodes: {mean:.1f} +/- {std:.1f}")


if __name__ == "__main__":
    main()
