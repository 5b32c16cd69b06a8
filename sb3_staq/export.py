"""
Export of the policy to a file that runs without this package: ONNX, TorchScript or ``torch.export``.

``python -m sb3_staq.export model.zip policy.onnx``, or :func:`export_policy`. The file takes a batch of observations as
environments return them (statistics of ``VecNormalize`` are folded in; images channel-first), one input per key of a
Dict. It returns ``action``, the deterministic actions of ``predict``, ``sample``, sampled ones, and ``prob``, the
probabilities of the bins, branch after branch. To draw with other random numbers, choose a bin ``i`` of each branch
``d`` by its ``branch_sizes[d]`` probabilities; its action is ``bins[d][i]``. Both lists are in the file's metadata.
"""

import argparse
import copy
import importlib.util
import io
import json
import logging
import pathlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import sb3_staq
from sb3_staq.array_files import is_npz, load_vec_normalize
from sb3_staq.exported_policy import ExportedPolicy
from sb3_staq.mirror_descent import log_policy
from sb3_staq.observations import select
from sb3_staq.policies import EVAL_POLICIES, StaQPolicy
from sb3_staq.save_util import atomic_write, open_archive, read_data
from sb3_staq.staq import StaQ

OUTPUTS = ["action", "sample", "prob"]
SUFFIXES = (".onnx", ".pt", ".pt2")
N_CHECKED = 64  # observations at which a file must match `predict`
TOLERANCE = 1e-3  # of probabilities, and of actions as a share of their range
ROUNDING = 5e-7  # of probabilities, as a share of the largest logit: four units in its last place
TIES = 0.05  # share of the observations where rounding may decide between equally good actions


def _write(module: ExportedPolicy, arrays: list[np.ndarray], suffix: str, metadata: dict[str, str]) -> bytes:
    file, example = io.BytesIO(), tuple(map(th.as_tensor, arrays))
    if suffix == ".pt":
        th.jit.save(th.jit.trace(module, example, check_trace=False), file, _extra_files=metadata)
        return file.getvalue()
    dynamic_shapes = (tuple({0: th.export.Dim("batch")} for _ in example),)
    program = th.export.export(module, example, dynamic_shapes=dynamic_shapes)
    if suffix == ".pt2":
        th.export.save(program, file, extra_files=metadata)
        return file.getvalue()
    axes = (tuple({0: "batch"} for _ in example),)  # or its name would be arbitrary
    inputs = [f"obs_{key}" if key in OUTPUTS else key for key in module.keys]  # names are unique within a graph
    names: Any = dict(input_names=inputs, output_names=OUTPUTS, dynamic_shapes=axes)
    onnx: Any = th.onnx.export(program, dynamo=True, verbose=False, **names)
    onnx.model.metadata_props.update(metadata)
    return onnx.model_proto.SerializeToString()


@contextmanager
def _silently() -> Iterator[None]:
    """Suppress what tracing and PyTorch's exporter have to say: the file is checked afterwards."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _run(data: bytes, suffix: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
    if suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        return session.run(OUTPUTS, {x.name: array for x, array in zip(session.get_inputs(), arrays, strict=True)})
    file = io.BytesIO(data)
    module: Any = th.jit.load(file) if suffix == ".pt" else th.export.load(file).module()
    return [x.numpy() for x in module(*map(th.as_tensor, arrays))]


def _check(policy: StaQPolicy, obs: Any, outputs: list[np.ndarray]) -> None:
    """Compare outputs with those of the policy at the (normalised) observations, one at a time."""
    found, sampled, found_prob = outputs
    singles = [select(obs, slice(i, i + 1)) for i in range(len(found))]
    actions = np.concatenate([policy.predict(single, deterministic=True)[0] for single in singles])
    with th.no_grad():
        logits = th.cat([policy.logits(policy.obs_to_tensor(single)[0]) for single in singles])
    prob, branches = log_policy(logits, policy.branches.sizes).exp(), policy.branches
    errors, difference = np.abs(found_prob - prob.numpy()), np.abs(found - actions)
    allowed = TOLERANCE + ROUNDING * logits.abs().amax(dim=1, keepdim=True).numpy()
    bins = branches.encode(th.as_tensor(policy.scale_action(sampled)).reshape(len(prob), -1))
    off = np.abs(sampled - policy.unscale_action(branches.decode(bins).numpy().reshape(sampled.shape)))
    if isinstance(policy.action_space, spaces.Box):
        span = (policy.action_space.high - policy.action_space.low).clip(min=1e-30)
        difference, off = difference / span, off / span
    n_wrong = (difference > TOLERANCE).reshape(len(prob), -1).any(axis=1).sum()
    possible = bool((off <= TOLERANCE).all() and (prob.gather(1, branches.columns(bins)) > 0).all())
    if not (errors <= allowed).all() or n_wrong > TIES * len(prob) or not possible:
        raise RuntimeError(
            f"The exported file would be wrong, so it was not written: at {len(prob)} observations its probabilities "
            f"differ by up to {errors.max():.3g} from those of predict, {n_wrong} actions do, and sampled actions are "
            f"{'' if possible else 'not '}all possible. A features extractor whose computation depends on values "
            "cannot be exported"
        )


def _load_statistics(path: str | pathlib.Path, model: StaQ | StaQPolicy) -> Any:
    if not is_npz(path):
        return load_from_pkl(path)
    env = gym.Env()
    env.observation_space, env.action_space = model.observation_space, model.action_space
    return load_vec_normalize(path, DummyVecEnv([lambda: env]))


def export_policy(
    model: StaQ | StaQPolicy,
    path: str | pathlib.Path,
    vec_normalize: VecNormalize | str | pathlib.Path | None = None,
    eval_policy: str | None = None,
) -> pathlib.Path:
    """
    Write the delivered policy to a file, once it is sure to match ``predict``. On failure, an old file is kept.

    :param model: the model, its policy, or a student of :func:`sb3_staq.distill.distill`
    :param path: the file: .onnx, .pt (TorchScript) or .pt2 (``torch.export``)
    :param vec_normalize: statistics to normalise observations with, or a file of them (an ".npz", or a pickle of your
        own); by default those of the model's environment
    :param eval_policy: "average", "best" or "last", by default that of the policy
    :return: the path
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"Invalid path={str(path)!r}: expected a name that ends in {', '.join(SUFFIXES)}")
    needed = ("onnx", "onnxscript", "onnxruntime") if path.suffix == ".onnx" else ()
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ImportError(f'{", ".join(missing)} missing. Please run: pip install "sb3-staq[export]"')
    if isinstance(vec_normalize, (str, pathlib.Path)):
        vec_normalize = _load_statistics(vec_normalize, model)
    elif vec_normalize is None and isinstance(model, StaQ):
        vec_normalize = model.get_vec_normalize_env()
    if not isinstance(vec_normalize, VecNormalize | None):
        raise ValueError(f"Invalid vec_normalize={vec_normalize!r}: expected VecNormalize, or a file that it saved")
    policy = copy.deepcopy(model.policy if isinstance(model, StaQ) else model).to("cpu")
    policy.eval_policy = eval_policy or policy.eval_policy
    if len(policy.frozen_critics) == 0:
        raise ValueError(f"Invalid model={model!r}: expected one with at least one policy update")

    module = ExportedPolicy(policy, vec_normalize)
    obs = module.draw_observations(N_CHECKED)
    metadata = {
        "algorithm": "StaQ",
        "version": sb3_staq.__version__,
        "observation_space": str(policy.observation_space),
        "action_space": str(policy.action_space),
        "inputs": json.dumps(module.keys),
        "branch_sizes": json.dumps(module.branches.sizes),
        "bins": json.dumps(module.bins()),
    }
    with _silently():
        data = _write(module, obs, path.suffix, metadata)
    batches = [_run(data, path.suffix, [x[rows] for x in obs]) for rows in (slice(1), slice(1, None))]
    _check(policy, module.normalise(obs), [np.concatenate(outputs) for outputs in zip(*batches, strict=True)])
    with atomic_write(path) as file:
        file.write(data)
    return path


def main() -> None:
    """Export the policy of a saved model to a file that runs without this package."""
    parser = argparse.ArgumentParser(prog="python -m sb3_staq.export", description=main.__doc__)
    parser.add_argument("model", help="zip-file of the model")
    parser.add_argument("path", help=f"the file to write: {', '.join(SUFFIXES)}")
    parser.add_argument("--vecnormalize", metavar="FILE", help="statistics that VecNormalize saved")
    parser.add_argument("--policy", choices=EVAL_POLICIES, help="by default that of the model")
    parser.add_argument("--distill", action="store_true", help="into one small network first; needs --env")
    parser.add_argument("--env", help="id of the environment for --distill")
    parser.add_argument("--replay-buffer", metavar="FILE", help="replayed states for --distill")
    parser.add_argument("--net-arch", type=int, nargs="*", help="hidden layers of the student")
    parser.add_argument("--max-kl", type=float, help="largest mean KL divergence to the stack, by default 0.01")
    parser.add_argument(
        "--weights-only",
        action=argparse.BooleanOptionalAction,
        default=True,
        help='run no code from the files; statistics and replay buffers must then be ".npz" (the default); '
        "--no-weights-only for pickles that you trust",
    )
    args = parser.parse_args()
    if args.distill and args.env is None:
        parser.error("--distill needs --env")
    for name in () if args.distill else ("net_arch", "max_kl", "replay_buffer"):
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} needs --distill")
    for path in filter(None, (args.vecnormalize, args.replay_buffer)):
        if args.weights_only and not is_npz(path):
            parser.error(f'{path} can run code; expected an ".npz", or --no-weights-only if you trust it')
    env: Any = None
    if args.env is not None:
        with open_archive(args.model, "zip") as file:
            n_envs = read_data(file).get("n_envs", 1)  # a replay buffer holds states of as many
        env = make_vec_env(args.env, n_envs)
    if env is not None and args.vecnormalize is not None:
        load = load_vec_normalize if is_npz(args.vecnormalize) else VecNormalize.load
        env = load(args.vecnormalize, env)
    # HER's buffer needs an environment, and without one no buffer is needed
    buffer: dict[str, Any] = {} if env is not None else dict(replay_buffer_class=None, replay_buffer_kwargs={})
    model = StaQ.load(args.model, env=env, device="cpu", weights_only=args.weights_only, **buffer)
    model.policy.eval_policy = args.policy or model.policy.eval_policy
    policy = model.policy
    if args.replay_buffer:
        model.load_replay_buffer(args.replay_buffer)
    if args.distill:
        kwargs: dict[str, Any] = {} if args.max_kl is None else dict(max_kl=args.max_kl)
        kwargs |= {} if args.net_arch is None else dict(policy_kwargs=dict(net_arch=args.net_arch))
        policy, report = model.distill(progress_bar=True, **kwargs)
        print(report)
    print("Wrote", export_policy(policy, args.path, args.vecnormalize))


if __name__ == "__main__":
    main()
