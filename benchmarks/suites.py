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
    """
    An environment of a suite.

    :param steps: environment steps of a training
    :param eval_freq: environment steps between two evaluations
    :param random: the return that counts as 0 where returns are normalised, near that of random actions
    :param reference: the return that counts as 1 where returns are normalised
    :param published: final returns by algorithm that were reported elsewhere
    """

    steps: int
    eval_freq: int
    random: float
    reference: float
    published: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """
    A comparison of algorithms on several environments.

    :param name: name of the suite
    :param description: one sentence
    :param algos: names of the algorithms in RL Zoo3; variants are called ``NAME_VARIANT``
    :param seeds: seeds of the trainings
    :param n_eval_episodes: episodes per evaluation
    :param envs: environments by id
    :param hyperparams: by algorithm, what replaces entries of RL Zoo3's hyperparameters
    :param published_source: where published returns come from
    :param published_steps: ... and after how many environment steps
    """

    name: str
    description: str
    algos: list[str]
    seeds: list[int]
    n_eval_episodes: int
    envs: dict[str, Environment]
    hyperparams: dict[str, dict[str, Any]] = field(default_factory=dict)
    published_source: str = ""
    published_steps: int = 0


def load_suites(path: Path = SUITES_FILE) -> dict[str, Suite]:
    """
    :param path: file of suites
    :return: suites by name
    """
    suites = {}
    for name, entries in yaml.safe_load(path.read_text()).items():
        envs = {env_id: Environment(**env) for env_id, env in entries.pop("envs").items()}
        suites[name] = Suite(name=name, envs=envs, **entries)
    return suites


def file_name(env_id: str) -> str:
    """
    :param env_id: id of an environment
    :return: the id without the slash of its namespace
    """
    return env_id.replace("/", "-")


@dataclass(frozen=True)
class Cell:
    """
    One training run.

    :param suite: name of its suite
    :param env_id: id of the environment
    :param algo: name of the algorithm in RL Zoo3, with that of its variant if it is one
    :param seed: seed of the training
    :param steps: environment steps of the training
    :param eval_freq: environment steps between two evaluations
    :param n_eval_episodes: episodes per evaluation
    :param hyperparams: what replaces entries of RL Zoo3's hyperparameters
    :param folder: where results and working files go
    """

    suite: str
    env_id: str
    algo: str
    seed: int
    steps: int
    eval_freq: int
    n_eval_episodes: int
    hyperparams: dict[str, Any] = field(default_factory=dict)
    folder: Path = FOLDER

    def __str__(self) -> str:
        return f"{self.env_id} {self.algo} seed {self.seed}"

    @property
    def zoo_algo(self) -> str:
        """Name of the algorithm in RL Zoo3, some of which have an underscore themselves."""
        from rl_zoo3.utils import ALGOS  # takes seconds

        return self.algo if self.algo in ALGOS else self.algo.partition("_")[0]

    @property
    def results_file(self) -> Path:
        """What the report is made from."""
        name = f"seed_{self.seed}.csv"
        return self.folder / "results" / self.suite / file_name(self.env_id) / self.algo / name

    @property
    def working_folder(self) -> Path:
        """Checkpoints, logs and the trained model."""
        return self.folder / "runs" / self.suite / file_name(self.env_id) / self.algo / f"seed_{self.seed}"

    def manager(self, trained_agent: str = "") -> Any:
        """
        :param trained_agent: model to continue with
        :return: RL Zoo3's ``ExperimentManager`` of this run
        """
        # Imported here because it takes seconds
        from rl_zoo3.exp_manager import ExperimentManager

        import sb3_staq.zoo  # noqa: F401, registers StaQ

        return ExperimentManager(
            argparse.Namespace(),
            self.zoo_algo,
            self.env_id,
            str(self.working_folder / "zoo"),
            n_timesteps=self.steps,
            eval_freq=-1,  # evaluations are ours, the same for all algorithms
            hyperparams=dict(self.hyperparams),
            trained_agent=trained_agent,
            seed=self.seed,
            verbose=0,
            device="cpu",
        )

    def settings(self) -> dict[str, Any]:
        """What two runs must have in common for one to continue the other."""
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
    """
    The cells of a suite, or those of them that are selected, seed by seed: whoever stops early has whole comparisons.

    :param suite: the suite
    :param algos: names of algorithms, None for all
    :param env_ids: ids of environments, None for all
    :param seeds: seeds, None for those of the suite
    :param steps: environment steps of each training, None for those of the suite
    :param folder: where results and working files go
    :return: the cells
    """
    return [
        Cell(
            suite.name,
            env_id,
            algo,
            seed,
            steps or suite.envs[env_id].steps,
            suite.envs[env_id].eval_freq,
            suite.n_eval_episodes,
            suite.hyperparams.get(algo, {}),
            folder,
        )
        for seed in (suite.seeds if seeds is None else seeds)
        for env_id in (env_ids or suite.envs)
        for algo in (algos or suite.algos)
    ]
