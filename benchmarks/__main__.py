"""``python -m benchmarks run SUITE`` and ``python -m benchmarks report SUITE``."""

import argparse
import importlib.util
import sys
from functools import partial
from pathlib import Path

from benchmarks.suites import FOLDER, SUITES_FILE, load_suites, make_cells

RAY_ADDRESSES = '"auto" (the cluster of this machine), HOST:PORT (seen from a node) or ray://HOST:PORT (from elsewhere)'


def positive(text: str) -> int:
    """Parse a number of the command line, which must be an integer above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not accepted; accepted: a whole number >= 1")
    return number


def make_parser() -> argparse.ArgumentParser:
    """Make the command-line parser."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train all cells of a suite that are not done, going on where they were")
    report = commands.add_parser("report", help="tables and figures from the results of a suite")
    for command in (run, report):
        command.add_argument("suite")
        command.add_argument("--suites", type=Path, default=SUITES_FILE, metavar="FILE", help="file of suites")
        command.add_argument("--folder", type=Path, default=FOLDER, help="where results/ and runs/ are")
    run.add_argument("--algos", nargs="+", help="some of the suite's algorithms")
    run.add_argument("--envs", nargs="+", help="some of the suite's environments")
    run.add_argument("--seeds", nargs="+", type=int, help="seeds instead of the suite's")
    run.add_argument("--steps", type=positive, help="environment steps of each training instead of the suite's")
    where = run.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=positive, default=1, help="cells at a time")
    where.add_argument("--ray", metavar="ADDRESS", help=f"run the cells on a Ray cluster instead: {RAY_ADDRESSES}")
    run.add_argument("--shared", action="store_true", help="the nodes share --folder, under the same path")
    run.add_argument("--fresh", action="store_true", help="replace results of other steps or hyperparameters")
    return parser


def main() -> int:
    """Run the command that the arguments name, and return the exit status."""
    parser = make_parser()
    args = parser.parse_args()
    suites = load_suites(args.suites)
    if args.suite not in suites:
        parser.error(f"suite {args.suite!r} is unknown; accepted: {', '.join(suites)}")
    suite = suites[args.suite]

    if args.command == "report":
        from benchmarks.report import write_report

        print(write_report(suite, args.folder / "results" / suite.name))
        return 0

    for option, chosen, known in (("--algos", args.algos, suite.algos), ("--envs", args.envs, suite.envs)):
        unknown = set(chosen or []) - set(known)
        if unknown:
            parser.error(f"{option}: {', '.join(unknown)} not in the suite; accepted: {', '.join(known)}")
    if args.shared and args.ray is None:
        parser.error("--shared goes with --ray only")
    if args.ray is not None and importlib.util.find_spec("ray") is None:
        parser.error('--ray needs Ray: pip install "sb3-staq[ray]"')
    cells = make_cells(suite, args.algos, args.envs, args.seeds, args.steps, args.folder.resolve())
    for cell in cells:
        if cell.steps < cell.eval_freq:
            parser.error(f"--steps {cell.steps} ends before the first evaluation; accepted: at least {cell.eval_freq}")
    from benchmarks.runner import run_cells, train_locally

    train = partial(train_locally, n_jobs=args.jobs)
    if args.ray is not None:
        from benchmarks.ray_runner import connect, train_on_ray

        try:
            connect(args.ray)
        except ConnectionError as error:
            parser.error(f"--ray {args.ray!r}: {error}; accepted: {RAY_ADDRESSES}")
        train = partial(train_on_ray, shared=args.shared)
    try:
        return 0 if run_cells(cells, train, args.fresh) else 1
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from the last checkpoints")
        return 130


if __name__ == "__main__":
    sys.exit(main())
