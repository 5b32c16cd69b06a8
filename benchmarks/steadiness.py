"""
One training of the search for the steadiest settings: ``python -m benchmarks.steadiness CANDIDATE ENV SEED``.

What is compared, and how the winner is chosen, stands in ``steadiness.md``.
"""

import argparse
import csv
import io
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import yaml
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule

from sb3_staq import StaQ, policies
from sb3_staq.critics import batched_forward
from sb3_staq.mirror_descent import decay_rate, kl_divergence, log_policy, logit_scale
from sb3_staq.save_util import atomic_write
from sb3_staq.zoo import default_config

FOLDER = Path(__file__).parent / "results" / "steadiness"
STEPS = 200_000
EVAL_FREQ = 10_000
N_EPISODES = 10
EVAL_SEED = 1_000_000
WINDOWS = (0.05, 0.10, 0.15, 0.25)
SNAPSHOT_FREQ = 500
COLLECTING_WINDOW = 0.15
MIXED = ("mixed", "mixed_replay")
KL_PER_DIMENSION = 0.02


class RecentAndAll(ReplayBuffer):
    """A replay buffer that takes half of each batch from the newest transitions."""

    n_recent = 50_000

    def sample(self, batch_size: int, env: Any = None) -> Any:
        n_stored, n_recent = self.size(), min(self.size(), self.n_recent // self.n_envs)
        age = np.where(
            np.arange(batch_size) % 2,
            np.random.randint(0, n_stored, size=batch_size),
            np.random.randint(0, n_recent, size=batch_size),
        )
        return self._get_samples((self.pos - 1 - age) % self.buffer_size, env=env)


class SearchedStaQ(StaQ):
    """StaQ with the candidates' changes that are no arguments of it."""

    candidate = "base"
    snapshots: list[tuple[int, dict[str, th.Tensor]]]

    def average_logits(self, window: float) -> Any:
        """The function from observations to the logits of the average over the last ``window`` of the steps."""
        start = (1 - window) * self.num_timesteps
        kept = [params for step, params in self.snapshots[:-1] if step > start] + [self.snapshots[-1][1]]
        stacked = {name: th.cat([params[name] for params in kept]) for name in kept[0]}
        weights = self.policy.frozen_critics.weights
        coefs = th.full((len(kept),), weights.scale * sum(weights.values) / len(kept))
        net = self.policy.additive_critics.net

        def logits(obs: th.Tensor) -> th.Tensor:
            with th.no_grad():
                return batched_forward(net, stacked, obs, coefs)

        return logits

    def remember_critics(self, *_: Any) -> None:
        """After a policy update: keep what it froze, every ``SNAPSHOT_FREQ`` steps."""
        if not self.snapshots or self.num_timesteps - self.snapshots[-1][0] >= SNAPSHOT_FREQ:
            newest = self.policy.frozen_critics[-1]
            self.snapshots.append((self.num_timesteps, {n: p.detach().clone() for n, p in newest.params.items()}))
            if self.candidate in MIXED:
                self._collecting_logits = self.average_logits(COLLECTING_WINDOW)

    def _sample_action(self, learning_starts: int, action_noise: Any = None, n_envs: int = 1) -> Any:
        actions, stored = super()._sample_action(learning_starts, action_noise, n_envs)
        if self.candidate in MIXED and self.snapshots:
            half = n_envs // 2
            groups = self.policy.action_groups
            logits = self._collecting_logits(self.policy.preprocess(th.as_tensor(self._last_obs[:half])))
            actions[:half] = self._to_env_actions(groups.sample(log_policy(logits, groups.sizes)))
            stored = self.policy.scale_action(actions)
        return actions, stored

    def _explore(self, actions: np.ndarray) -> np.ndarray:
        if self.candidate == "explore":
            uniform = self._to_env_actions(self.policy.action_groups.uniform(len(actions)))
            return np.where(np.random.rand(*actions.shape) < 0.02, uniform, actions)
        return super()._explore(actions)

    def _next_coefficients(self, q_values: th.Tensor, logit_sums: th.Tensor) -> tuple[float, float]:
        kl_coef, ent_coef = super()._next_coefficients(q_values, logit_sums)
        weights, sizes = self.policy.frozen_critics.weights, self.policy.action_groups.sizes
        if self.candidate != "kl" or not weights.values:
            return kl_coef, ent_coef
        # The KL divergence falls with kl_coef: halve the bracket of its logarithm
        old = self._log_policy(logit_sums)
        low, high = math.log(0.01 * ent_coef), math.log(100 * ent_coef)
        for _ in range(12):
            middle = math.exp((low + high) / 2)
            beta = decay_rate(middle, ent_coef)
            scale = logit_scale("weight_corrected", middle, ent_coef, self.memory_size)
            new = log_policy(scale * (beta * logit_sums + q_values), sizes)
            if kl_divergence(new, old).mean().item() > KL_PER_DIMENSION * len(sizes):
                low = math.log(middle)
            else:
                high = math.log(middle)
        return math.exp((low + high) / 2), ent_coef


class AveragePolicy:
    """What ``evaluate_policy`` needs of a model, for the average over a window."""

    def __init__(self, model: SearchedStaQ, window: float):
        self.groups, self.policy = model.policy.action_groups, model.policy
        self.logits = model.average_logits(window)

    def predict(self, obs: np.ndarray, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
        """Greedy actions."""
        stored = self.groups.deterministic(self.logits(self.policy.preprocess(th.as_tensor(obs)))).numpy()
        return self.policy.unscale_action(stored), None


class Evaluate(BaseCallback):
    """Evaluate the last policy and the averages, and write the result file anew each time."""

    model: SearchedStaQ

    def __init__(self, env_id: str, path: Path, header: dict[str, Any]):
        super().__init__()
        self.env = make_vec_env(env_id, N_EPISODES)
        self.path, self.header = path, header
        self.rows: list[list[Any]] = []
        self.cpu_seconds, self._clock = 0.0, 0.0

    def _on_training_start(self) -> None:
        self.model.policy_update_hooks.append(self.model.remember_critics)
        self._clock = time.process_time()

    def _on_step(self) -> bool:
        if self.num_timesteps % EVAL_FREQ == 0:
            self.cpu_seconds += time.process_time() - self._clock
            for window in (0.0, *WINDOWS):
                self.env.seed(EVAL_SEED)
                model: Any = AveragePolicy(self.model, window) if window else self.model
                returns, _ = evaluate_policy(model, self.env, N_EPISODES, return_episode_rewards=True, warn=False)
                mean, std = np.mean(returns), np.std(returns)
                text = " ".join(f"{value:.6g}" for value in returns)
                self.rows.append(
                    [window, self.num_timesteps, f"{self.cpu_seconds:.1f}", f"{mean:.6g}", f"{std:.6g}", text]
                )
            self._write()
            self._clock = time.process_time()
        return True

    def _write(self) -> None:
        text = io.StringIO()
        for key, value in self.header.items():
            text.write(f"# {key}: {value}\n")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["window", "step", "cpu_seconds", "mean", "std", "returns"])
        writer.writerows(self.rows)
        with atomic_write(self.path) as file:
            file.write(text.getvalue().encode())


def settings_of(candidate: str, env_id: str) -> dict[str, Any]:
    """Arguments of the constructor: the shipped ones, with the candidate's changes."""
    settings = dict(yaml.safe_load(default_config().read_text())[env_id])
    for name in ("n_timesteps", "policy", "n_envs"):
        settings.pop(name)
    settings["learning_rate"] = LinearSchedule(float(settings["learning_rate"].removeprefix("lin_")), 0.0, 1.0)
    net_arch = dict(pi=[128, 128], qf=[256, 256])
    if candidate == "hard":
        settings["target_update_interval"] = 250
    elif candidate == "entropy":
        settings["target_entropy"] = "lin_0.6_0.3"
    elif candidate in ("replay", "mixed_replay"):
        settings |= dict(buffer_size=STEPS, replay_buffer_class=RecentAndAll)
    elif candidate == "kl":
        settings["memory_size"] = 20
    elif candidate == "ensemble":
        settings["n_critics"] = 5
        net_arch["qf"] = [160, 160]
        policies.CRITIC_REDUCTIONS["min"] = lambda values: values[th.randperm(len(values))[:2]].amin(dim=0)
    return {**settings, "policy_kwargs": dict(net_arch=net_arch)}


def use_hard_targets(model: SearchedStaQ, tau: float) -> None:
    """Copy the critics to their targets every ``target_update_interval`` steps; main effects keep their average."""
    policy = model.policy
    interval, model.target_update_interval = model.target_update_interval, 1

    def update_targets(_: float) -> None:
        main_effects, average = policy.main_effects, policy.main_effects_target
        assert main_effects is not None and average is not None
        for new, old in zip(main_effects.parameters(), average.parameters(), strict=True):
            old.data.lerp_(new.data, tau)
        if model._n_updates % interval == 0:
            policy.critics_target.load_state_dict(policy.critics.state_dict())

    policy.update_targets = update_targets  # type: ignore[method-assign]


def main() -> None:
    """Train one candidate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steadiness", description=main.__doc__)
    names = ["base", "mixed", "mixed_replay", "hard", "entropy", "replay", "explore", "ensemble", "kl"]
    parser.add_argument("candidate", choices=names)
    parser.add_argument("env")
    parser.add_argument("seed", type=int)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    path = FOLDER / args.env / args.candidate / f"seed_{args.seed}.csv"
    if path.exists() and len(path.read_text().splitlines()) > 5 * (args.steps // EVAL_FREQ):
        print(f"{path} is complete")
        return
    th.set_num_threads(1)
    settings = settings_of(args.candidate, args.env)
    env = make_vec_env(args.env, 8, seed=args.seed)
    model = SearchedStaQ("MlpPolicy", env, seed=args.seed, device="cpu", **settings)
    model.candidate, model.snapshots = args.candidate, []
    if args.candidate == "hard":
        use_hard_targets(model, model.tau)
    header = {"candidate": args.candidate, "env": args.env, "seed": args.seed, "steps": args.steps}
    model.learn(args.steps, callback=Evaluate(args.env, path, header), log_interval=None)


if __name__ == "__main__":
    main()
