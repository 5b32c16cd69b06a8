r"""
What a stack loses and saves as one distilled network: ``python -m benchmarks.distillation --agent NAME MODEL ENV``.

For instance:

    python -m benchmarks.distillation \
        --agent CartPole trained_agents/staq/CartPole-v1_1 CartPole-v1 \
        --agent Hopper trained_agents/staq/Hopper-v4_1 Hopper-v4

MODEL is a zip file, or a folder of RL Zoo3 with ``ENV.zip`` and perhaps ``ENV/vecnormalize.pkl``. Everything runs on
one core, and states come from the environment only. Each agent gets a CSV file in ``benchmarks/results/distillation``,
and ``report.md`` there is a table of all agents; without ``--agent``, only this table is rewritten.
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch.utils.benchmark import Timer

from sb3_staq import StaQ, StaQPolicy
from sb3_staq.distill import DistillReport, distill
from sb3_staq.export import export_policy
from sb3_staq.observations import select

FOLDER = Path(__file__).parent / "results" / "distillation"


def load(env_id: str, model: Path) -> StaQ:
    """Load an agent, a zip file or a folder of RL Zoo3, with its environment."""
    path = model / f"{env_id}.zip" if model.is_dir() else model
    statistics = path.parent / env_id / "vecnormalize.pkl"
    env: Any = make_vec_env(env_id)
    if statistics.exists():
        env = VecNormalize.load(str(statistics), env)
    return StaQ.load(path, env=env, device="cpu")


def onnx_numbers(policy: StaQPolicy, model: StaQ, report: DistillReport) -> dict[str, float]:
    """Measure the exported policy: bytes, and milliseconds for one observation on one core (median)."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = export_policy(policy, Path(folder) / "policy.onnx", model.get_vec_normalize_env())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        n_bytes = path.stat().st_size
    first = select(report.held_out, slice(1))
    inputs = first if isinstance(first, dict) else {"obs": first}
    arrays = {key: (x.float() if x.is_floating_point() else x).numpy() for key, x in inputs.items()}
    times = Timer("run()", globals={"run": lambda: session.run(["action"], arrays)}).blocked_autorange()
    return {"onnx_bytes": n_bytes, "onnx_ms": 1000 * times.median}


def measure(name: str, model: StaQ, max_steps: int) -> pd.DataFrame:
    """Distil an agent, and return one row for its stack and one for the student."""
    student, report = distill(model, max_steps=max_steps, progress_bar=True)
    print(f"{name}\n{report}")
    rows = []
    for kind, policy, numbers in (("stack", model.policy, report.stack), ("student", student, report.student)):
        row = {
            "agent": name,
            "policy": kind,
            "critics": int(policy.frozen_critics.coefs(policy.eval_policy).count_nonzero()),
            "parameters": numbers.n_parameters,
            "saved_bytes": numbers.n_bytes,
            "predict_ms": numbers.ms_per_action,
            **onnx_numbers(policy, model, report),
            "kl_mean": report.kl_mean,
            "kl_max": report.kl_max,
            "agreement": report.agreement,
            "gradient_steps": report.n_steps,
            "returns": " ".join(f"{value:.6g}" for value in numbers.returns),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> str:
    """Format the rows of all agents as a Markdown table."""
    returns = rows["returns"].str.split().map(lambda values: np.array(values, dtype=float))
    student, columns = rows["policy"] == "student", rows[["agent", "policy", "critics"]].copy()
    columns["return"] = [f"{x.mean():.0f} ± {x.std():.0f}" for x in returns]
    columns["parameters"] = rows["parameters"].map("{:,}".format)
    columns["ONNX file"] = (rows["onnx_bytes"] / 1e6).map("{:.2f} MB".format)
    columns["`predict`"] = rows["predict_ms"].map("{:.2f} ms".format)
    columns["onnxruntime"] = rows["onnx_ms"].map("{:.3f} ms".format)
    kl = rows["kl_mean"].map("{:.3g}".format) + rows["kl_max"].map(" ({:.3g})".format)
    columns["KL, mean (largest)"] = kl.where(student, "")
    columns["same bin"] = rows["agreement"].map("{:.1%}".format).where(student, "")
    columns = columns.rename(columns={"critics": "networks that act"})
    return columns.to_markdown(index=False, disable_numparse=True) + "\n"


def main() -> None:
    """Distil the agents given on the command line, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__)
    parser.add_argument("--agent", nargs=3, action="append", default=[], metavar=("NAME", "MODEL", "ENV"))
    parser.add_argument("--max-steps", type=int, default=20_000, help="gradient steps at most")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the results are")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    th.set_num_threads(1)
    for name, path, env_id in args.agent:
        rows = measure(name, load(env_id, Path(path)), args.max_steps)
        file = re.sub("[^A-Za-z0-9]+", "_", name).strip("_").lower()
        rows.to_csv(args.folder / f"{file}.csv", index=False, float_format="%.4g")
    tables = [pd.read_csv(path, dtype={"returns": str}) for path in sorted(args.folder.glob("*.csv"))]
    if tables:
        (args.folder / "report.md").write_text(table(pd.concat(tables)))


if __name__ == "__main__":
    main()
