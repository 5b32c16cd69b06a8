"""Hindsight experience replay on SB3's bit-flipping task."""

import sys

from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_staq import StaQ

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000

env = BitFlippingEnv(n_bits=8, continuous=False, max_steps=8)
model = StaQ(
    "MultiInputPolicy",
    env,
    learning_rate=1e-3,
    gamma=0.95,
    memory_size=20,  # the stack is evaluated at every relabelled state, so keep it short
    replay_buffer_class=HerReplayBuffer,
    replay_buffer_kwargs=dict(n_sampled_goal=4, goal_selection_strategy="future"),
    policy_kwargs=dict(net_arch=[64, 64]),
    seed=0,
)
model.learn(steps)
mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
print(f"Mean return of 20 episodes: {mean:.2f}")
