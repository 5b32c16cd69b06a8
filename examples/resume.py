"""Save checkpoints regularly. If the process is killed, run the script again: it continues as if nothing happened."""

import sys

from sb3_staq import StaQ
from sb3_staq.resume import ResumeCallback

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000

callback = ResumeCallback(save_freq=max(1, steps // 5), save_path="checkpoints")
model = StaQ("MlpPolicy", "CartPole-v1", policy_kwargs=dict(net_arch=[64, 64]), seed=0)
model.learn(steps, callback=callback)
model.save("staq_cartpole.zip")
