"""Suites of training runs. A cell is one of them: an algorithm, an environment and a seed."""

import argparse
import contextlib
import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
SUITES_FILE = FOLDER / "suites.yml"


@dataclass(frozen=True)
class Environment:
    """An environment of a suite, see ``suites.yml``."""

    steps: int
    eval_freq: int
    random: float
    reference: float
    zero: float | None = None


@dataclass(frozen=True)
class Suite:
    """A comparison of algorithms on several environments."""

    name: str
    description: str
    algos: list[str]  # names in RL Zoo3; variants are called NAME_VARIANT
    seeds: list[int]
    n_eval_episodes: int
    envs: dict[str, Environment]  # by id
    hyperparams: dict[str, dict[str, Any]] = field(default_factory=dict)  # by algorithm
    seeds_by_algo: dict[str, list[int]] = field(default_factory=dict)  # of the algorithms that have others

    def seeds_of(self, algo: str) -> list[int]:
        """Return the seeds of an algorithm's trainings."""
        return self.seeds_by_algo.get(algo, self.seeds)


def load_suites(path: Path = SUITES_FILE) -> dict[str, Suite]:
    """Load the suites from their file, by name."""
    suites = {}
    for name, entries in yaml.safe_load(path.read_text()).items():
        envs = {env_id: Environment(**env) for env_id, env in entries.pop("envs").items()}
        suites[name] = Suite(name=name, envs=envs, **entries)
    return suites


def file_name(env_id: str) -> str:
    """Return the id of an environment without the slash of its namespace."""
    return env_id.replace("/", "-")


@dataclass(frozen=True)
class Cell:
    """One training run."""

    suite: str
    env_id: str
    algo: str
    seed: int
    steps: int
    eval_freq: int
    n_eval_episodes: int
    hyperparams: dict[str, Any] = field(default_factory=dict)  # these replace entries of RL Zoo3's
    folder: Path = FOLDER  # where results and working files go

    def __str__(self) -> str:
        return f"{self.env_id} {self.algo} seed {self.seed}"

    @property
    def zoo_algo(self) -> str:
        """Name of the algorithm in RL Zoo3; some names have an underscore themselves."""
        from rl_zoo3.utils import ALGOS  # takes seconds

        return self.algo if self.algo in ALGOS else self.algo.partition("_")[0]

    @property
    def results_file(self) -> Path:
        """The file that the report is made from."""
        return self.folder / "results" / self.suite / file_name(self.env_id) / self.algo / f"seed_{self.seed}.csv"

    @property
    def working_folder(self) -> Path:
        """The folder of checkpoints, logs and the trained model."""
        return self.folder / "runs" / self.suite / file_name(self.env_id) / self.algo / f"seed_{self.seed}"

    def manager(self) -> Any:
        """Make RL Zoo3's ``ExperimentManager`` for this run."""
        from rl_zoo3.exp_manager import ExperimentManager  # takes seconds

        import sb3_staq.zoo  # noqa: F401, registers StaQ

        return ExperimentManager(
            argparse.Namespace(algo=self.zoo_algo, env=self.env_id, env_kwargs=None, seed=self.seed),  # for `enjoy`
            self.zoo_algo,
            self.env_id,
            str(self.working_folder / "zoo"),
            n_timesteps=self.steps,
            eval_freq=-1,  # evaluations are ours, the same for all algorithms
            hyperparams=dict(self.hyperparams),
            seed=self.seed,
            verbose=0,
            device="cpu",
        )

    def settings(self) -> dict[str, Any]:
        """Return what two runs must have in common for one to continue the other."""
        with contextlib.redirect_stdout(io.StringIO()):  # the zoo prints what it reads
            hyperparams, _ = self.manager().read_hyperparameters()
        return {
            "steps": self.steps,
            "eval_freq": self.eval_freq,
            "n_eval_episodes": self.n_eval_episodes,
            "hyperparams": hyperparams,
            "hyperparams_sha256": hashlib.sha256(json.dumps(hyperparams, sort_keys=True).encode()).hexdigest()[:12],
        }


def make_cells(
    suite: Suite,
    algos: list[str] | None = None,
    env_ids: list[str] | None = None,
    seeds: list[int] | None = None,
    steps: int | None = None,
    folder: Path = FOLDER,
) -> list[Cell]:
    """Make a suite's cells, or a selection, seed by seed, so that stopping early leaves complete comparisons."""
    seeds_of = {algo: suite.seeds_of(algo) if seeds is None else seeds for algo in algos or suite.algos}
    return [
        Cell(
            suite=suite.name,
            env_id=env_id,
            algo=algo,
            seed=seed,
            steps=steps or suite.envs[env_id].steps,
            eval_freq=suite.envs[env_id].eval_freq,
            n_eval_episodes=suite.n_eval_episodes,
            hyperparams=suite.hyperparams.get(algo, {}),
            folder=folder,
        )
        for seed in seeds or sorted({seed for of_algo in seeds_of.values() for seed in of_algo})
        for env_id in env_ids or suite.envs
        for algo in seeds_of
        if seed in seeds_of[algo]
    ]
