"""Save now and then, and go on after the process was killed: run it again, and it continues."""

import sys
from pathlib import Path

import gymnasium as gym
from stable_baselines3.common.callbacks import CheckpointCallback

from sb3_staq import StaQ

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
folder = Path("checkpoints")

callback = CheckpointCallback(
    save_freq=max(1, steps // 5),
    save_path=str(folder),
    save_replay_buffer=True,
)
saved = sorted(folder.glob("rl_model_*_steps.zip"), key=lambda path: path.stat().st_mtime)
if saved:
    model = StaQ.load(saved[-1], env=gym.make("CartPole-v1"))
    buffer = f"rl_model_replay_buffer_{model.num_timesteps}_steps.pkl"
    model.load_replay_buffer(folder / buffer)
    print(f"Going on from {model.num_timesteps} steps")
else:
    model = StaQ("MlpPolicy", "CartPole-v1", policy_kwargs=dict(net_arch=[64, 64]), seed=0)

# The steps that are left
model.learn(steps - model.num_timesteps, callback=callback, reset_num_timesteps=False)
model.save("staq_cartpole.zip")
