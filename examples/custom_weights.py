"""Custom policy updates: weights of the critics by age, and coefficients as functions of the progress."""

import sys

from sb3_staq import StaQ

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
shared = dict(
    policy="MlpPolicy",
    env="CartPole-v1",
    policy_kwargs=dict(net_arch=[64, 64]),
    seed=0,
)

# The policy is softmax(sum_age w(age) Q_{k-age}), with weights newest first; kl_coef has no effect
three_weights = StaQ(memory_size=3, logit_rule=[10.0, 5.0, -1.0], **shared)
three_weights.learn(steps)

by_age = StaQ(memory_size=20, logit_rule=lambda age: 5 / (1 + age), **shared)
by_age.learn(steps)

# From 0.12 to 0.02; the argument is the remaining progress, from 1 to 0
falling_entropy = StaQ(ent_coef=lambda progress: 0.02 + 0.1 * progress**2, **shared)
falling_entropy.learn(steps)
