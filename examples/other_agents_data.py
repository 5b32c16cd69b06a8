"""Learning from the replay buffer of another agent, without environment steps of its own."""

import sys

from stable_baselines3 import DQN

from sb3_staq import StaQ

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000

dqn = DQN("MlpPolicy", "CartPole-v1", buffer_size=10_000, seed=0)
dqn.learn(steps)
dqn.save_replay_buffer("buffer.pkl")

model = StaQ("MlpPolicy", "CartPole-v1", buffer_size=10_000, seed=0)
model.load_replay_buffer("buffer.pkl")  # or fill it with model.replay_buffer.add
model.train(steps // 4, batch_size=64)  # policy updates come by themselves
print(f"Policy updates: {model.n_policy_updates}")
