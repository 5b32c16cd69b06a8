"""Running normalisation of observations, and how to use it in the evaluation."""

import sys

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_staq import StaQ

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000

env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=4, seed=0), norm_reward=False)
model = StaQ("MlpPolicy", env, learning_starts=500, train_freq=1, seed=0)
model.learn(steps)
model.save("staq_pendulum.zip")
env.save("staq_pendulum_statistics.pkl")

env = VecNormalize.load("staq_pendulum_statistics.pkl", make_vec_env("Pendulum-v1", seed=1))
env.training = False  # do not update the statistics during the evaluation
model = StaQ.load("staq_pendulum.zip", env=env)
print(evaluate_policy(model, env, n_eval_episodes=10))
