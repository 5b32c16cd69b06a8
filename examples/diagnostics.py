"""Record what each policy update does, evaluate along the way, and plot the result."""

import sys

import gymnasium as gym
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.monitor import Monitor

from sb3_staq import StaQ
from sb3_staq.callbacks import PolicyUpdateDiagnostics
from sb3_staq.plotting import plot_diagnostics, read_diagnostics

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000

evaluation = EvalCallback(
    Monitor(gym.make("CartPole-v1")),
    eval_freq=max(1, steps // 10),
    log_path=".",
    verbose=0,
)
model = StaQ(
    "MlpPolicy",
    "CartPole-v1",
    memory_size=20,
    policy_update_interval=200,
    gradient_steps=2,
    policy_kwargs=dict(net_arch=[64, 64]),
    seed=0,
)
model.learn(steps, callback=[PolicyUpdateDiagnostics("cartpole.csv"), evaluation])

data = read_diagnostics("cartpole.csv")
print(data[["step", "kl", "lost_kl", "entropy", "action_gap"]].tail())
plot_diagnostics(data).savefig("cartpole.png")
