"""Every action space as branches of bins, held against brute-force enumeration of the joint bins."""

import itertools
import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomObsEnv, make_model
from stable_baselines3 import SAC
from stable_baselines3.common.envs import (
    IdentityEnv,
    IdentityEnvBox,
    IdentityEnvMultiBinary,
    IdentityEnvMultiDiscrete,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_staq import StaQ
from sb3_staq.action_spaces import MIN_PEAK, make_branches
from sb3_staq.mirror_descent import decay_rate, entropy, log_policy, step_size

UNEVEN_BOX = spaces.Box(np.array([-1.0, 0.0, -3.0]), np.array([1.0, 2.0, 5.0]), dtype=np.float32)
SPACES = {
    "discrete": (spaces.Discrete(5), {}),
    "discrete_start": (spaces.Discrete(3, start=-4), {}),
    "multi_discrete": (spaces.MultiDiscrete([2, 4, 3]), {}),
    "multi_discrete_start": (spaces.MultiDiscrete([2, 3], start=[5, -1]), {}),
    "multi_discrete_2d": (spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[0, 5], [-1, 0]]), {}),
    "multi_binary": (spaces.MultiBinary(3), {}),
    "multi_binary_3d": (spaces.MultiBinary([2, 1, 2]), {}),
    "box_factored": (UNEVEN_BOX, dict(action_grid="factored", action_bins=4)),
    "box_axis": (UNEVEN_BOX, dict(action_grid="axis")),
    "box_joint": (UNEVEN_BOX, dict(action_grid="joint", action_bins=3)),
    "box_rounding": (spaces.Box(-1.0, -0.4, (2,), np.float32), dict(action_grid="factored", action_bins=2)),
    "box_fixed": (spaces.Box(np.float32([-1, 0.5]), np.float32([2, 0.5])), dict(action_grid="factored", action_bins=3)),
    "box_2d": (spaces.Box(-2.0, 1.0, (2, 2), np.float32), dict(action_grid="factored", action_bins=2)),
}


def all_bins(sizes) -> th.Tensor:
    """Every combination of bins, shape (product of sizes, number of branches)."""
    return th.tensor(list(itertools.product(*map(range, sizes))))


class OneStepEnv(gym.Env):
    """Episodes of one step with a constant observation, whatever the action space."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, action_space: spaces.Space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return np.zeros(2, np.float32), 1.0, True, False, {}


@pytest.mark.parametrize("name", SPACES)
def test_decode_and_encode_are_inverse(name):
    """All joint bins give different stored actions, from which they are recovered."""
    space, kwargs = SPACES[name]
    branches = make_branches(space, **kwargs)
    bins = all_bins(branches.sizes)
    actions = branches.decode(bins)
    assert len(actions.unique(dim=0)) == len(bins)
    assert th.equal(branches.encode(actions), bins)


@pytest.mark.parametrize(
    "grid", [dict(action_grid="axis"), *(dict(action_grid="joint", action_bins=n) for n in (3, 4))], ids=str
)
def test_components_without_a_choice(grid):
    """Where the bounds are equal, a bin is still learnt from its own actions."""
    space = spaces.Box(np.float32([-1, 0.5, -2]), np.float32([1, 0.5, 4]))
    policy = make_model(OneStepEnv(space), **grid).policy
    bins = th.arange(policy.branches.n_bins).unsqueeze(1)
    actions = policy.unscale_action(policy.branches.decode(bins).numpy())
    stored = policy.scale_action(actions)
    assert stored.dtype == np.float32
    found = policy.branches.encode(th.as_tensor(stored)).flatten()
    np.testing.assert_allclose(actions[found], actions, rtol=1e-6)


def test_expected_bins():
    """The numbers of bins of each grid, and their extremes."""
    sizes = {name: make_branches(space, **kwargs).sizes for name, (space, kwargs) in SPACES.items()}
    assert sizes == {
        "discrete": (5,),
        "discrete_start": (3,),
        "multi_discrete": (2, 4, 3),
        "multi_discrete_start": (2, 3),
        "multi_discrete_2d": (2, 3, 4, 2),
        "multi_binary": (2, 2, 2),
        "multi_binary_3d": (2, 2, 2, 2),
        "box_factored": (4, 4, 4),
        "box_axis": (7,),
        "box_joint": (27,),
        "box_rounding": (2, 2),
        "box_fixed": (3, 3),
        "box_2d": (2, 2, 2, 2),
    }
    axis = make_branches(UNEVEN_BOX, "axis").decode(th.arange(7).unsqueeze(1))
    assert axis.abs().sum(dim=1).tolist() == [0] + [1] * 6
    factored = make_branches(UNEVEN_BOX, "factored", 4).decode(all_bins((4, 4, 4)))
    assert factored.unique().tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])


@pytest.mark.parametrize("name", ["box_factored", "box_axis", "box_joint", "box_2d"])
def test_encode_finds_the_nearest_bin(name):
    """For arbitrary stored actions, as another agent's buffer holds them; also outside the bounds."""
    space, kwargs = SPACES[name]
    branches = make_branches(space, **kwargs)
    actions = 3 * th.rand(200, int(np.prod(space.shape)), generator=th.Generator().manual_seed(0)) - 1.5
    candidates = branches.decode(all_bins(branches.sizes))
    found = branches.decode(branches.encode(actions))
    distance = (actions.unsqueeze(1) - candidates).square().sum(dim=2).min(dim=1).values
    assert th.allclose((actions - found).square().sum(dim=1), distance, atol=1e-6)


@pytest.mark.parametrize("name", SPACES)
def test_distribution_against_the_joint_distribution(name):
    """Log-probabilities, entropy and mode of the product policy are those of the enumerated joint distribution."""
    space, kwargs = SPACES[name]
    branches = make_branches(space, **kwargs)
    logits = th.randn(1, branches.n_bins, dtype=th.float64, generator=th.Generator().manual_seed(1))
    bins = all_bins(branches.sizes)
    # The sum of the chosen logits, by a loop, normalised over all joint bins
    starts = [sum(branches.sizes[:g]) for g in range(len(branches.sizes))]
    scores = th.tensor([sum(logits[0, start + int(c)] for start, c in zip(starts, row, strict=True)) for row in bins])
    joint = scores - scores.logsumexp(dim=0)

    distribution = branches.distribution(logits.expand(len(bins), -1))
    chosen = bins if len(branches.sizes) > 1 else bins.squeeze(1)
    assert th.allclose(distribution.log_prob(chosen), joint)
    expected_entropy = -(joint.exp() * joint).sum()
    assert th.allclose(distribution.entropy(), expected_entropy)
    assert th.allclose(entropy(log_policy(logits, branches.sizes)), expected_entropy)
    assert th.allclose(log_policy(logits, branches.sizes)[0, branches.columns(bins)].sum(dim=1), joint)
    assert branches.mode(logits).squeeze(0).tolist() == bins[joint.argmax()].tolist()


def test_bins_without_probability_are_never_drawn(monkeypatch):
    """Not even with the random number 0, which a generator gives once in 2^24 draws."""
    monkeypatch.setattr(th, "rand_like", th.zeros_like)
    log_prob = th.tensor([[0.0, 0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.5, 0.5]]).log()
    bins = make_branches(spaces.MultiDiscrete([3, 2])).sample(log_prob)
    assert bins.tolist() == [[2, 1], [1, 0]]


def is_one_hill(p) -> bool:
    """No bin lies in a valley: by more than MIN_PEAK below one on its left and one on its right."""
    return not any(min(p[i], p[k]) - p[j] > MIN_PEAK for i, j, k in itertools.combinations(range(len(p)), 3))


def deterministic_by_definition(branches, logits) -> list[float]:
    """The mean of the stored action's component where the policy is one hill, else the best bin."""
    action, start = [], 0
    for i, size in enumerate(branches.sizes):
        values = branches.decode(th.arange(size).unsqueeze(1).expand(-1, len(branches.sizes)))[:, i].tolist()
        p = np.exp(logits[start : start + size] - np.max(logits[start : start + size]))
        p = p / p.sum()
        action.append(float(np.dot(p, values)) if is_one_hill(p) else values[int(np.argmax(p))])
        start += size
    return action


@pytest.mark.parametrize("name", ["box_factored", "box_rounding", "box_2d"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_deterministic_actions_of_a_box(name, scale):
    """Against the definition: a mean or the best bin, branch by branch and state by state."""
    space, kwargs = SPACES[name]
    branches = make_branches(space, **kwargs)
    logits = scale * th.randn(300, branches.n_bins, dtype=th.float64, generator=th.Generator().manual_seed(3))
    expected = [deterministic_by_definition(branches, row) for row in logits.numpy()]
    np.testing.assert_allclose(branches.deterministic(logits), expected, atol=1e-6)


def test_both_kinds_of_deterministic_actions_occur():
    """... in the test above, and for each number of bins at which they may."""
    generator = th.Generator().manual_seed(4)
    for size in (2, 3, 5, 9):
        branches = make_branches(spaces.Box(-1, 1, (1,)), action_bins=size)
        logits = 2 * th.randn(500, size, dtype=th.float64, generator=generator)
        hills = np.array([is_one_hill(p) for p in logits.softmax(dim=1).numpy()])
        assert hills.all() if size == 2 else 50 < hills.sum() < 450
        expected = [deterministic_by_definition(branches, row) for row in logits.numpy()]
        np.testing.assert_allclose(branches.deterministic(logits), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("prob", "expected"),
    [
        ([0.5, 0.0, 0.5], -1.0),  # steer around the obstacle, left or right; of equals the first
        ([0.4, 0.0, 0.6], 1.0),
        ([0.2, 0.6, 0.2], 0.0),
        ([0.1, 0.2, 0.7], 0.6),
        ([1.0, 0.0, 0.0], -1.0),
        ([1 / 3, 1 / 3, 1 / 3], 0.0),
        # A dip that is no deeper than MIN_PEAK is no valley
        ([0.39, 0.3, 0.31], -0.08),
        ([0.3 + 0.99 * MIN_PEAK, 0.3, 0.4 - 0.99 * MIN_PEAK], 0.1 - 1.98 * MIN_PEAK),
        ([0.36 + 1.01 * MIN_PEAK / 2, 0.28 - 1.01 * MIN_PEAK, 0.36 + 1.01 * MIN_PEAK / 2], -1.0),
        # The valley need not lie beside the peaks, nor have a flat bottom
        ([0.35, 0.15, 0.05, 0.1, 0.35], -1.0),
        ([0.34, 0.12, 0.08, 0.12, 0.34], -1.0),
        ([0.1, 0.1, 0.6, 0.1, 0.1], 0.0),
        ([0.3, 0.1, 0.2, 0.1, 0.3], -1.0),
    ],
)
def test_mean_of_one_hill_and_best_bin_of_two(prob, expected):
    branches = make_branches(spaces.Box(-1, 1, (1,)), action_bins=len(prob))
    action = branches.deterministic(th.tensor([prob], dtype=th.float64).log()).item()
    assert action == pytest.approx(expected, abs=1e-6)
    # A constant and the other branches are no matter
    two = make_branches(spaces.Box(-1, 1, (2,)), action_bins=len(prob))
    logits = th.tensor([[*(p + 1e-30 for p in prob), *([1.0] * len(prob))]], dtype=th.float64).log() + 7.0
    assert two.deterministic(logits).tolist()[0] == pytest.approx([expected, 0.0], abs=1e-6)


@pytest.mark.parametrize("above", [False, True])
def test_boundary_of_a_valley(above):
    """Exactly MIN_PEAK is not enough: it has to be more."""
    dip = MIN_PEAK + (1e-6 if above else -1e-6)
    p = [(1 + dip) / 3, (1 - 2 * dip) / 3, (1 + dip) / 3]
    branches = make_branches(spaces.Box(-1, 1, (1,)), action_bins=3)
    assert branches.deterministic(th.tensor([p], dtype=th.float64).log()).item() == pytest.approx(-above, abs=1e-6)


def test_choices_without_an_order_have_no_mean():
    """The deterministic action is the best bin of each branch, whatever the policy looks like."""
    for space in (spaces.Discrete(3), spaces.MultiDiscrete([3, 3]), spaces.MultiBinary(2)):
        branches = make_branches(space)
        logits = th.randn(50, branches.n_bins, generator=th.Generator().manual_seed(5))
        assert th.equal(branches.deterministic(logits), branches.decode(branches.mode(logits)))
    for grid in ("axis", "joint"):
        branches = make_branches(spaces.Box(-1, 1, (2,)), grid, 3)
        logits = th.randn(50, branches.n_bins, generator=th.Generator().manual_seed(5))
        assert th.equal(branches.deterministic(logits), branches.decode(logits.argmax(dim=1, keepdim=True)))


class Obstacle(gym.Env):
    """Steer left or right of it: the best policies have two peaks, between which lies what they avoid."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def observe(self):
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        return self.observe(), float(abs(action[0]) > 0.4), False, self.t >= 20, {}


@pytest.mark.slow
def test_greedy_actions_avoid_what_the_policy_avoids():
    model = make_model(
        Monitor(Obstacle()), critic="joint", net_arch=(32,), buffer_size=3000, learning_rate=3e-3, gamma=0.9,
        batch_size=64, ent_coef=0.1, kl_coef=0.1, policy_update_interval=50,
    ).learn(2000)  # fmt: skip
    env = Monitor(Obstacle())
    env.reset(seed=1)
    greedy, stochastic = (evaluate_policy(model, env, 20, deterministic=how)[0] for how in (True, False))
    assert stochastic > 18
    assert greedy >= stochastic - 1
    log_pi = model.policy.get_distribution(th.zeros(1, 2)).distribution.logits
    assert not is_one_hill(log_pi.exp()[0].tolist())


def test_branchwise_update_is_the_joint_optimum():
    """For an additive Q and a product policy, no joint distribution has a better value of the EPMD objective."""
    generator = th.Generator().manual_seed(2)
    sizes, kl_coef, ent_coef = (3, 2, 2), 0.7, 0.3
    xi = th.randn(sum(sizes), dtype=th.float64, generator=generator)
    q_terms = th.randn(sum(sizes), dtype=th.float64, generator=generator)
    bins = all_bins(sizes)
    columns = bins + th.tensor([0, 3, 5])

    def joint(logits: th.Tensor) -> th.Tensor:
        return log_policy(logits, sizes)[columns].sum(dim=1)

    q_joint, log_old = q_terms[columns].sum(dim=1), joint(xi)

    def objective(log_p: th.Tensor) -> th.Tensor:
        p = log_p.exp()
        return (p * q_joint).sum() - ent_coef * (p * log_p).sum() - kl_coef * (p * (log_p - log_old)).sum()

    updated = joint(decay_rate(kl_coef, ent_coef) * xi + step_size(kl_coef, ent_coef) * q_terms)
    free = th.zeros(len(bins), dtype=th.float64, requires_grad=True)
    optimizer = th.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure():
        optimizer.zero_grad()
        loss = -objective(th.log_softmax(free, dim=0))
        loss.backward()
        return loss

    optimizer.step(closure)
    best = th.log_softmax(free.detach(), dim=0)
    assert objective(updated) >= objective(best) - 1e-12
    assert th.allclose(updated.exp(), best.exp(), atol=1e-5)


@pytest.mark.parametrize("name", SPACES)
def test_actions_are_in_the_space(name, tmp_path):
    """Training, predicting and loading on every space; the environment asserts that it contains the actions."""
    space, kwargs = SPACES[name]
    model = make_model(OneStepEnv(space), exploration_initial_eps=0.5, exploration_final_eps=0.5, **kwargs)
    model.learn(60)
    assert len(model.policy.frozen_critics) > 0
    obs = model.observation_space.sample()
    for deterministic in (True, False):
        action, _ = model.predict(obs, deterministic=deterministic)
        assert space.contains(space.dtype.type(action) if space.shape == () else action)
        batch, _ = model.predict(np.stack([obs] * 3), deterministic=deterministic)
        assert batch[0].shape == space.shape and len(batch) == 3
    model.save(tmp_path / "model.zip")
    loaded = StaQ.load(tmp_path / "model.zip")
    logits = model.policy.logits(th.zeros(1, 2))
    assert th.equal(loaded.policy.logits(th.zeros(1, 2)), logits) and logits.abs().max() > 0
    assert loaded.policy.branches.sizes == model.policy.branches.sizes


def test_buffer_of_another_agent():
    """Transitions that SAC collected, with actions anywhere in the box, train StaQ."""
    sac = SAC("MlpPolicy", "Pendulum-v1", learning_starts=1000, buffer_size=500, seed=0)
    sac.learn(200)
    model = make_model("Pendulum-v1", action_bins=5, learning_starts=0)
    model.learn(1)
    model.replay_buffer = sac.replay_buffer
    before = model.policy.critics.net.q_net[0].weight.clone()
    model.train(gradient_steps=5, batch_size=32)
    after = model.policy.critics.net.q_net[0].weight
    assert th.isfinite(after).all() and not th.equal(after, before)


def test_too_many_joint_bins():
    """The error counts them and says what is accepted."""
    space = spaces.Box(-1, 1, (6,), np.float32)
    for bins in (5, np.int64(5)):
        with pytest.raises(
            ValueError, match=r"Invalid action_grid='joint': action_bins=5 in 6 .*15625.*expected at most 4096"
        ):
            make_model(OneStepEnv(space), action_grid="joint", action_bins=bins)
    with pytest.raises(ValueError, match=r"action_bins=4 in 32 dimensions make 18446744073709551616 bins"):
        make_model(OneStepEnv(spaces.Box(-1, 1, (32,))), action_grid="joint", action_bins=np.int64(4))


class GridEnv(RandomObsEnv):
    """The reward is the share of the components of a 2 x 2 action that are those of the observation."""

    def __init__(self):
        super().__init__(action_space=spaces.MultiDiscrete([[2, 3], [3, 2]], start=[[0, 1], [-1, 0]]))
        self.observation_space = spaces.MultiDiscrete([2, 3, 3, 2])

    def step(self, action):
        wanted = self._last.reshape(2, 2) + self.action_space.start
        obs, _, terminated, truncated, info = super().step(action)
        assert action.shape == wanted.shape
        return obs, float((action == wanted).mean()), terminated, truncated, info


SLOW_WAYS = [pytest.param(way, marks=pytest.mark.slow) for way in (dict(critic="joint"), dict(n_steps=2))]


@pytest.mark.parametrize("kwargs", [{}, *SLOW_WAYS], ids=str)
def test_actions_of_several_dimensions_are_learned(kwargs):
    settings = dict(net_arch=(32,), gamma=0.0, buffer_size=3000, batch_size=64, learning_rate=3e-3, ent_coef=0.02)
    settings |= dict(kl_coef=0.1, policy_update_interval=50, train_freq=2, gradient_steps=1)
    model = make_model(GridEnv(), **settings, **kwargs).learn(3000)
    observations = np.array(list(itertools.product(range(2), range(3), range(3), range(2))))
    actions, _ = model.predict(observations, deterministic=True)
    wanted = observations.reshape(-1, 2, 2) + model.action_space.start
    assert actions.shape == wanted.shape
    assert (actions == wanted).mean() > 0.95
    assert (model.predict(observations[7], deterministic=True)[0] == actions[7]).all()


IDENTITY_ENVS = {
    "discrete": (lambda: IdentityEnv(10), {}),
    "multi_discrete": (lambda: IdentityEnvMultiDiscrete(4), {}),
    "multi_binary": (lambda: IdentityEnvMultiBinary(2), {}),
    "box_factored": (lambda: IdentityEnvBox(eps=0.5), dict(action_bins=5)),
    "box_axis": (lambda: IdentityEnvBox(eps=0.5), dict(action_grid="axis")),
    "box_joint": (lambda: IdentityEnvBox(eps=0.5), dict(action_grid="joint", action_bins=5)),
}


FAST = ("discrete",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in IDENTITY_ENVS]
)
def test_identity_environments_are_solved(name):
    """The action must tell the observation: 100 is the largest return."""
    make_env, kwargs = IDENTITY_ENVS[name]
    model = make_model(
        DummyVecEnv([make_env]),
        net_arch=(32,),
        gamma=0.0,
        learning_rate=3e-3,
        batch_size=64,
        buffer_size=3000,
        learning_starts=200,
        train_freq=4,
        gradient_steps=2,
        policy_update_interval=100,
        memory_size=20,
        kl_coef=0.2,
        ent_coef=0.05,
        **kwargs,
    )
    model.learn(3000)
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20, warn=False)
    assert mean >= 90


@pytest.mark.slow
def test_pendulum():
    """A continuous task: -200 and more is a pendulum that is swung up and held."""
    model = make_model(
        "Pendulum-v1",
        net_arch=(64, 64),
        gamma=0.98,
        learning_rate=1e-3,
        batch_size=128,
        buffer_size=20_000,
        learning_starts=1000,
        train_freq=8,
        tau=0.01,
        target_update_interval=1,
        policy_update_interval=200,
        memory_size=25,
        kl_coef=1.0,
        ent_coef=0.2,
        action_bins=9,
    )
    model.learn(10_000)
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
    assert mean >= -200


@pytest.mark.parametrize("critic", ["additive", "joint"])
@pytest.mark.parametrize("name", SPACES)
def test_no_double_precision(name, critic):
    """Some devices have none: no parameter, no buffer and nothing that is saved, before and after a training."""
    space, kwargs = SPACES[name]
    model = make_model(OneStepEnv(space), net_arch=(8,), critic=critic, **kwargs)
    for n_steps in (0, 40):
        model.learn(n_steps)
        policy = model.policy
        tensors = dict(policy.named_parameters()) | dict(policy.named_buffers()) | policy.state_dict()
        assert tensors
        assert [key for key, tensor in tensors.items() if tensor.dtype == th.float64] == []
        optimizer = [x for state in policy.optimizer.state.values() for x in state.values() if th.is_tensor(x)]
        assert not any(x.dtype == th.float64 for x in optimizer)
    batch = model.replay.sample(4)
    assert batch.next_log_prob.dtype == policy.logits(batch.observations).dtype == th.float32


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (0,)), spaces.Box(-1, 1, (2, 0))], ids=str)
def test_spaces_without_components(space):
    env = RandomObsEnv(action_space=space)
    with pytest.raises(ValueError, match=rf"Invalid action_space={re.escape(str(space))}: expected at least one comp"):
        make_model(env)
