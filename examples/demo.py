"""Train StaQ on CartPole-v1, show the progress, evaluate the policy, and keep the model and its learning curve."""

import argparse
from pathlib import Path

import gymnasium as gym
import matplotlib
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.utils import LinearSchedule

from sb3_staq import StaQ

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EVAL_SEED = 1_000_000  # far from that of the training


def plot_learning_curve(folder: Path, title: str) -> Path:
    """
    :param folder: has the training episodes (monitor.csv) and the evaluations (evaluations.npz)
    :param title: of the figure
    :return: the figure's path
    """
    episodes = load_results(str(folder))
    evaluations = np.load(folder / "evaluations.npz")
    returns = evaluations["results"]
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.plot(
        episodes["l"].cumsum(), episodes["r"], ".", color="0.75", markersize=3, label="training episodes (exploring)"
    )
    ax.plot(
        evaluations["timesteps"], returns.mean(axis=1), color="#0072B2", label="evaluation, greedy: mean of 10 episodes"
    )
    ax.fill_between(
        evaluations["timesteps"],
        returns.min(axis=1),
        returns.max(axis=1),
        color="#0072B2",
        alpha=0.2,
        label="min to max",
    )
    ax.set(title=title, xlabel="environment steps", ylabel="return of an episode")
    ax.legend(loc="lower right")
    path = folder / "learning_curve.png"
    fig.savefig(path, dpi=120)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000, help="environment steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where the results go")
    args = parser.parse_args()
    th.set_num_threads(1)  # small networks: more threads only get in each other's way
    args.folder.mkdir(parents=True, exist_ok=True)

    model = StaQ(
        "MlpPolicy",
        Monitor(gym.make("CartPole-v1"), str(args.folder)),
        learning_rate=LinearSchedule(1e-3, 0.0, 1.0),
        batch_size=128,
        train_freq=8,
        tau=0.01,
        policy_kwargs=dict(net_arch=[64, 64]),
        seed=args.seed,
    )
    evaluation = EvalCallback(
        make_vec_env("CartPole-v1", seed=EVAL_SEED),
        eval_freq=max(1, args.steps // 20),
        n_eval_episodes=10,
        log_path=str(args.folder),
        best_model_save_path=str(args.folder),
        verbose=0,
    )
    model.learn(args.steps, callback=evaluation, progress_bar=True)
    model.save(args.folder / "staq_cartpole.zip")

    model = StaQ.load(args.folder / "staq_cartpole.zip")
    mean, std = evaluate_policy(model, make_vec_env("CartPole-v1", seed=EVAL_SEED), n_eval_episodes=20)
    figure = plot_learning_curve(args.folder, f"StaQ on CartPole-v1, seed {args.seed}")
    print(f"Model:          {args.folder / 'staq_cartpole.zip'} ({len(model.policy.frozen_critics)} frozen critics)")
    print(f"Learning curve: {figure}")
    print(f"Mean return over 20 evaluation episodes: {mean:.1f} +/- {std:.1f}")


if __name__ == "__main__":
    main()
