"""Train on CartPole-v1, save, load, and evaluate."""

import sys

import gymnasium as gym
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_staq import StaQ

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000

model = StaQ(
    "MlpPolicy",
    "CartPole-v1",
    policy_kwargs=dict(net_arch=[64, 64]),
    verbose=1,
    seed=0,
)
model.learn(steps)
model.save("staq_cartpole.zip")

model = StaQ.load("staq_cartpole.zip", env=gym.make("CartPole-v1"))
mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
print(f"Mean return of 10 greedy episodes: {mean:.1f} +/- {std:.1f}")
