"""Train, distil the stack into one small network, export it, and act with the file alone."""

import sys

import gymnasium as gym
import numpy as np
import onnxruntime

from sb3_staq import StaQ
from sb3_staq.export import export_policy

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000

# Train
model = StaQ("MlpPolicy", gym.make("CartPole-v1"), seed=0).learn(steps)

# Distil: `student` is a policy like any other, `report` says what was lost
student, report = model.distill(
    max_kl=0.01,
    max_steps=max(1000, steps // 5),
    progress_bar=True,
)
print(report)
student.save("student.pth")

# Export the student; or the stack, with export_policy(model, "policy.onnx")
export_policy(student, "policy.onnx")

# On the robot: greedy actions, sampled actions, and the probabilities of the bins
session = onnxruntime.InferenceSession("policy.onnx")
obs = np.zeros((1, 4), np.float32)
action, sample, prob = session.run(["action", "sample", "prob"], {"obs": obs})
print(f"Greedy action: {action[0]}, sampled action: {sample[0]}, probabilities: {prob[0]}")
