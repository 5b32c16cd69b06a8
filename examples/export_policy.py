"""Take a policy out of Python: torch.export keeps the whole stack, for batches of any size."""

import sys

import torch as th

from sb3_staq import StaQ

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000


class Actor(th.nn.Module):
    """
    Observations in, greedy actions out.

    :param policy: the policy of a trained model
    """

    def __init__(self, policy: th.nn.Module):
        super().__init__()
        self.policy = policy

    def forward(self, observation: th.Tensor) -> th.Tensor:
        """Return the greedy actions for observations."""
        return self.policy(observation, deterministic=True)


model = StaQ("MlpPolicy", "CartPole-v1", policy_kwargs=dict(net_arch=[64, 64]), seed=0)
model.learn(steps)
model.policy.to("cpu")

actor = Actor(model.policy)
example = th.zeros(2, 4)
program = th.export.export(actor, (example,), dynamic_shapes=({0: th.export.Dim("batch")},))
th.export.save(program, "staq_cartpole.pt2")

loaded = th.export.load("staq_cartpole.pt2").module()
observations = th.randn(100, 4)
print("Same actions:", bool((loaded(observations) == actor(observations)).all()))
