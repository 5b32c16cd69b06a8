"""MinAtar's Breakout: one convolution, 128 hidden units."""

import sys

import gymnasium as gym

from sb3_staq import StaQ
from sb3_staq.minatar import MinAtarPolicy, MinAtarWrapper, register_envs

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000

register_envs()  # "-v1" has the actions that have an effect in the game, "-v0" all six
model = StaQ(
    MinAtarPolicy,
    MinAtarWrapper(gym.make("MinAtar/Breakout-v1")),
    batch_size=128,
    learning_starts=min(5_000, steps // 2),
    gradient_steps=2,
    tau=1.0,
    target_update_interval=500,
    policy_update_interval=2_000,
    memory_size=50,
    kl_coef=0.1,
    ent_coef=0.01,
    policy_kwargs=dict(net_arch=[128]),
    seed=0,
)
model.learn(steps, progress_bar=sys.stdout.isatty())
