"""StaQ and its policy without pickles: the same logits, the same training, and clear errors."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomObsEnv, grow, make_model, sample_obs

from sb3_staq import StaQ, StaQPolicy

KINDS = {
    "box": ("MlpPolicy", lambda: RandomObsEnv("box"), {}),
    "dict": ("MultiInputPolicy", lambda: RandomObsEnv("dict"), {}),
    "image": ("CnnPolicy", lambda: RandomObsEnv("image"), dict(policy_kwargs=dict(activation_fn=th.nn.Tanh))),
    "groups": ("MlpPolicy", lambda: RandomObsEnv(action_space=spaces.MultiDiscrete([2, 3])), {}),
    "joint": (
        "MlpPolicy",
        lambda: RandomObsEnv(action_space=spaces.Box(-1, 2, (2,), np.float32)),
        dict(critic="joint", ent_coef="auto_0.2", kl_coef="rel_0.5"),
    ),
    "optimizer": ("MlpPolicy", RandomObsEnv, dict(policy_kwargs=dict(optimizer_class=th.optim.RMSprop))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    policy, make_env, kwargs = KINDS[kind]
    model = make_model(make_env(), policy, **kwargs).learn(60)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy.pth")
    model.save_replay_buffer(tmp_path / "buffer.npz")
    obs = sample_obs(model.observation_space, 20)
    if kind == "image":
        obs = obs.permute(0, 3, 1, 2) if obs.shape[-1] == 1 else obs
    loaded = StaQ.load(tmp_path / "model", env=make_env(), device="cpu", weights_only=True)
    alone = type(model.policy).load(tmp_path / "policy.pth", device="cpu", weights_only=True)
    for each in (loaded.policy, alone):
        assert th.equal(each.logits(obs), model.policy.logits(obs))
    loaded.load_replay_buffer(tmp_path / "buffer.npz")
    assert np.array_equal(loaded.replay_buffer.rewards, model.replay_buffer.rewards)
    usual = StaQ.load(tmp_path / "model", env=make_env(), device="cpu")
    left_out = {
        "device",
        "env",
        "policy",
        "replay_buffer",
        "_logit_cache",
        "_logger",
        "_last_episode_starts",
        "_last_original_obs",
    }
    for name in vars(usual).keys() - left_out:
        assert str(getattr(loaded, name)) == str(getattr(usual, name)), name
    loaded.learn(30, reset_num_timesteps=False)
    assert loaded.num_timesteps == 90


def test_code_is_named_and_can_be_passed(tmp_path):
    model = make_model(RandomObsEnv(), learning_rate=lambda progress: 0.01 * progress, ent_coef=lambda _: 0.1)
    grow(model, 2)
    model.save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"model.zip: .*code for learning_rate \(.*ent_coef \("):
        StaQ.load(tmp_path / "model.zip", weights_only=True)
    loaded = StaQ.load(
        tmp_path / "model.zip", weights_only=True, learning_rate=0.3, custom_objects=dict(ent_coef=0.1), device="cpu"
    )
    assert loaded.lr_schedule(1.0) == 0.3
    obs = sample_obs(model.observation_space, 20)
    assert th.equal(loaded.policy.logits(obs), model.policy.logits(obs))
    model.policy.save(tmp_path / "policy.pth")
    assert th.equal(StaQPolicy.load(tmp_path / "policy.pth", weights_only=True).logits(obs), model.policy.logits(obs))
