"""LunarLander-v3 with the tuned settings: four environments, and an entropy coefficient that falls."""

import sys

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule

from sb3_staq import StaQ

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 250_000

model = StaQ(
    "MlpPolicy",
    make_vec_env("LunarLander-v3", n_envs=4, seed=0),
    learning_rate=LinearSchedule(6e-4, 0.0, 1.0),
    batch_size=128,
    learning_starts=2_000,
    gradient_steps=12,
    tau=0.01,
    policy_update_interval=400,
    memory_size=50,
    ent_coef="lin_0.5_0.02_0.6",  # from 0.5 to 0.02 over the first 60% of the training
    exploration_initial_eps=0.1,
    exploration_final_eps=0.1,
    policy_kwargs=dict(net_arch=[128, 128]),
    seed=0,
)
model.learn(steps, progress_bar=sys.stdout.isatty())
model.save("staq_lander.zip")
