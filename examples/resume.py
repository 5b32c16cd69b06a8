"""Save everything now and then, and go on exactly where the process was killed: run it again, and it continues."""

import sys

from sb3_staq import StaQ
from sb3_staq.resume import ResumeCallback

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000

callback = ResumeCallback(save_freq=max(1, steps // 5), save_path="checkpoints")
model = StaQ("MlpPolicy", "CartPole-v1", policy_kwargs=dict(net_arch=[64, 64]), seed=0)
model.learn(steps, callback=callback)
model.save("staq_cartpole.zip")
