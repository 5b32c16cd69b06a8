"""Pong from its pixels, with the convolutional network of SB3. Needs a GPU; without one it takes days."""

import sys

import ale_py
import gymnasium as gym
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

from sb3_staq import StaQ

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000

gym.register_envs(ale_py)
model = StaQ(
    "CnnPolicy",
    VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=8, seed=0), n_stack=4),
    learning_rate=1e-4,
    learning_starts=min(100_000, steps // 2),
    batch_size=32,
    train_freq=4,
    gradient_steps=8,
    tau=1.0,
    target_update_interval=1_000,
    policy_update_interval=10_000,
    memory_size=20,
    kl_coef=0.05,
    ent_coef=0.01,
    optimize_memory_usage=True,  # half of the memory: 3 GB
    replay_buffer_kwargs=dict(handle_timeout_termination=False),
    tensorboard_log="logs",
    device="auto",  # "cuda" if there is one
    seed=0,
)
model.learn(steps, progress_bar=sys.stdout.isatty())
model.save("staq_pong.zip")
