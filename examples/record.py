"""Record a GIF of a trained agent that is stored in the RL Zoo's layout. Needs no screen."""

import argparse
import os
import sys
from pathlib import Path

if sys.platform == "linux" and "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported

import gymnasium as gym
import rl_zoo3.import_envs  # noqa: F401 (registers environments)
from huggingface_sb3 import EnvironmentName
from PIL import Image
from rl_zoo3.utils import create_test_env, get_model_path, get_saved_hyperparams
from stable_baselines3.common.vec_env import VecEnv

import sb3_staq.zoo  # noqa: F401 (registers StaQ and MinAtar)
from sb3_staq import StaQ


def load_agent(
    folder: str | Path, env_id: str, seed: int = 0, render: bool = False, exp_id: int = 0
) -> tuple[StaQ, VecEnv]:
    """
    Load an agent, and the environment with the wrappers of its training.

    :param folder: folder with the agent in ``staq/ENV_1``
    :param env_id: id of the environment
    :param seed: seed of the environment
    :param render: whether ``env.render()`` is to return images
    :param exp_id: number of the training, 0 for the newest
    :return: model and environment
    """
    name = EnvironmentName(env_id)
    _, model_path, log_path = get_model_path(exp_id, str(folder), "staq", name)
    hyperparams, stats_path = get_saved_hyperparams(str(Path(log_path) / name), test_mode=True)
    env_kwargs = hyperparams.pop("env_kwargs", {}) | ({"render_mode": "rgb_array"} if render else {})
    if render and str(gym.spec(env_id).entry_point).startswith("gymnasium.envs.mujoco"):
        env_kwargs["camera_name"] = "track"  # follows the robot, unlike the default of recent Gymnasium
    env = create_test_env(
        env_id, stats_path=stats_path, seed=seed, should_render=False, hyperparams=hyperparams, env_kwargs=env_kwargs
    )
    return StaQ.load(model_path, device="cpu"), env


def record(
    model: StaQ, env: VecEnv, path: Path, seconds: float = 6.0, width: int = 300, max_bytes: int = 2_000_000
) -> None:
    """
    Record greedy actions. Frames are shrunk until the file is small enough.

    :param model: the agent
    :param env: its environment, with ``render_mode="rgb_array"``
    :param path: path of the GIF
    :param seconds: length, in the time of the environment
    :param width: width of a frame, in pixels
    :param max_bytes: largest size of the file
    """
    fps = env.metadata.get("render_fps") or 10
    stride = max(1, round(fps / 20))
    frames, obs = [], env.reset()
    for step in range(int(seconds * fps)):
        if step % stride == 0:
            frames.append(Image.fromarray(env.render()))
        obs, *_ = env.step(model.predict(obs, deterministic=True)[0])
    while True:
        size = (width, round(width * frames[0].height / frames[0].width))
        # NEAREST keeps the edges when the squares of a grid are enlarged
        method = Image.Resampling.NEAREST if frames[0].width < width else Image.Resampling.LANCZOS
        first, *rest = [frame.resize(size, method).quantize(64, dither=Image.Dither.NONE) for frame in frames]
        first.save(path, save_all=True, append_images=rest, duration=round(1000 * stride / fps), loop=0, optimize=True)
        if path.stat().st_size <= max_bytes:
            return
        width = int(0.8 * width)


def main() -> None:
    """Record the agent given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("-f", "--folder", default="trained_agents", help="where the RL Zoo keeps the agents")
    parser.add_argument("-o", "--output", type=Path, help="path of the GIF; ENV.gif by default")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--width", type=int, default=300, help="in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    output = args.output or Path(f"{EnvironmentName(args.env)}.gif")
    record(*load_agent(args.folder, args.env, args.seed, render=True), output, args.seconds, args.width)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
