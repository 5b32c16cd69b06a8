"""HalfCheetah-v5: continuous actions need no special arguments."""

import sys

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule

from sb3_staq import StaQ

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000

model = StaQ(
    "MlpPolicy",
    make_vec_env("HalfCheetah-v5", n_envs=8, seed=0),
    learning_rate=LinearSchedule(1e-3, 0.0, 1.0),
    buffer_size=50_000,
    learning_starts=min(5_000, steps // 2),
    train_freq=1,
    seed=0,
)
model.learn(steps, progress_bar=sys.stdout.isatty())
model.save("staq_cheetah.zip")
