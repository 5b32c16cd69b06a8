"""RL Zoo3's commands, literally, in processes of their own: the package has to be installed (either way)."""

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import optuna
import pytest
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS, get_trained_models
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_staq.zoo
from sb3_staq import StaQ
from sb3_staq.coefficients import value_at

CARTPOLE = ["--algo", "staq", "--env", "CartPole-v1"]
TRAIN = [*CARTPOLE, "-n", "600", "--eval-freq", "-1", "-params", "learning_starts:100", "policy_update_interval:100"]


def run(*command: str, cwd: Path, **env: str) -> str:
    """
    :param command: arguments for the interpreter
    :param cwd: working directory
    :param env: environment variables
    :return: what was printed, on both streams
    """
    # No window for plots, and small networks are not faster on many threads
    env = {**os.environ, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", **env}
    result = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def saved_config(folder: Path) -> dict:
    return dict(yaml.load((folder / "CartPole-v1" / "config.yml").read_text(), Loader=yaml.UnsafeLoader))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``rl_zoo3.train`` was run, with an evaluation and with its replay buffer saved."""
    folder = tmp_path_factory.mktemp("zoo")
    args = ["--eval-freq", "300", "--eval-episodes", "2", "--save-replay-buffer"]
    output = run("-m", "rl_zoo3.train", *TRAIN, *args, cwd=folder)
    assert str(Path("hyperparams") / "staq.yml") in output
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``rl_zoo3.train -optimize`` was run."""
    folder = tmp_path_factory.mktemp("optimize")
    args = "-n 200 -optimize --n-trials 2 --n-evaluations 1 --eval-episodes 1 --storage study.log --study-name study"
    output = run("-m", "rl_zoo3.train", *CARTPOLE, *args.split(), "-params", "learning_starts:100", cwd=folder)
    assert "Number of finished trials:  2" in output
    return folder


def test_train(trained: Path):
    folder = trained / "logs" / "staq" / "CartPole-v1_1"
    model = StaQ.load(folder / "CartPole-v1.zip")
    assert model.num_timesteps == 600 and model.policy_update_interval == 100
    assert (folder / "best_model.zip").is_file() and (folder / "replay_buffer.pkl").is_file()
    # The rest is from the hyperparameter file
    tuned = yaml.safe_load(sb3_staq.zoo.default_config().read_text())["CartPole-v1"]
    assert saved_config(folder) == {**tuned, "learning_starts": 100, "policy_update_interval": 100}
    assert model.memory_size == tuned["memory_size"]


@pytest.mark.parametrize("args", [[], ["--load-best"], ["--n-envs", "2"]])
def test_enjoy(trained: Path, args):
    output = run("-m", "rl_zoo3.enjoy", *CARTPOLE, "-f", "logs", "-n", "400", "--no-render", *args, cwd=trained)
    assert "Loading" in output


def test_continue_training(trained: Path):
    agent = "logs/staq/CartPole-v1_1/CartPole-v1.zip"
    output = run("-m", "rl_zoo3.train", *TRAIN, "-i", agent, "-f", "continued", cwd=trained)
    assert "Loading replay buffer" in output
    model = StaQ.load(trained / "continued" / "staq" / "CartPole-v1_1" / "CartPole-v1.zip")
    assert model.num_timesteps >= 600


RESUMABLE = """
CartPole-v1:
  policy: MlpPolicy
  n_timesteps: 800
  n_envs: 2
  normalize: true
  learning_starts: 100
  policy_update_interval: 100
  callback: {sb3_staq.resume.ResumeCallback: {save_freq: 150, save_path: checkpoints}}
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs signals of Unix")
@pytest.mark.parametrize("args", [[], ["-i", "first.zip"]])
def test_killed_training_goes_on(trained: Path, tmp_path: Path, args):
    """The same command again, and the agent and the monitor files are those of a training that was not killed."""
    command = ["-m", "rl_zoo3.train", *CARTPOLE, "-conf", "my.yml", "--seed", "0", "--eval-freq", "-1", *args]
    lived, killed = (tmp_path / name for name in ("lived", "killed"))
    for folder in (lived, killed):
        folder.mkdir()
        shutil.copy(trained / "logs" / "staq" / "CartPole-v1_1" / "CartPole-v1.zip", folder / "first.zip")
        (folder / "my.yml").write_text(RESUMABLE)

    def result(folder: Path, i: int) -> tuple[list[str], Path]:
        folder = folder / "logs" / "staq" / f"CartPole-v1_{i}"
        lines = [line for path in sorted(folder.glob("*monitor.csv")) for line in path.read_text().splitlines()]
        return [line.rpartition(",")[0] for line in lines if line[0] != "#"], folder / "CartPole-v1.zip"

    run(*command, cwd=lived)
    process = subprocess.Popen([sys.executable, *command], cwd=killed, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(result(killed, 1)[0]) < 0.6 * len(result(lived, 1)[0]):
        time.sleep(0.01)
    process.kill()
    assert process.wait() != 0 and list(killed.glob("checkpoints/step_*"))
    assert "Training goes on from step" in run(*command, cwd=killed)
    (expected, agent), (found, other) = result(lived, 1), result(killed, 2)
    assert found == expected and len(found) > 10
    one, two = (StaQ.load(path, device="cpu").policy.state_dict() for path in (agent, other))
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


@pytest.mark.slow
def test_subproc(tmp_path: Path):
    run("-m", "rl_zoo3.train", *TRAIN, "n_envs:2", "--vec-env", "subproc", cwd=tmp_path)
    assert StaQ.load(tmp_path / "logs" / "staq" / "CartPole-v1_1" / "CartPole-v1.zip").n_envs == 2


def test_other_config_file(tmp_path: Path):
    """A file given with ``-conf`` replaces ours."""
    (tmp_path / "mine.yml").write_text("CartPole-v1: {n_timesteps: 300, policy: MlpPolicy, memory_size: 7}")
    run("-m", "rl_zoo3.train", *CARTPOLE, "-conf", "mine.yml", "--eval-freq", "-1", cwd=tmp_path)
    assert saved_config(tmp_path / "logs" / "staq" / "CartPole-v1_1")["memory_size"] == 7


def test_console_script(trained: Path):
    script = Path(sysconfig.get_path("scripts")) / ("rl_zoo3.exe" if os.name == "nt" else "rl_zoo3")
    if not script.exists():
        pytest.skip("RL Zoo3 is not installed in this very environment")
    result = subprocess.run([str(script), "train", "--help"], capture_output=True, text=True, check=True)
    assert "staq" in result.stdout


@pytest.mark.parametrize("switch", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_explicit_way(tmp_path: Path, switch):
    """With the start-up hook or without it."""
    run("-m", "sb3_staq.zoo", "train", *TRAIN, cwd=tmp_path, SB3_STAQ_NO_ZOO=switch)
    args = ["-f", "logs", "-n", "100", "--no-render"]
    run("-m", "sb3_staq.zoo", "enjoy", *CARTPOLE, *args, cwd=tmp_path, SB3_STAQ_NO_ZOO=switch)


@pytest.mark.slow
def test_explicit_way_subproc(tmp_path: Path):
    args = [*TRAIN, "n_envs:2", "--vec-env", "subproc"]
    run("-m", "sb3_staq.zoo", "train", *args, cwd=tmp_path, SB3_STAQ_NO_ZOO="1")


@pytest.mark.slow
@pytest.mark.parametrize("entry", [["-m", "rl_zoo3.plots."], ["-m", "sb3_staq.zoo", ""]], ids=["rl_zoo3", "explicit"])
def test_plots(trained: Path, tmp_path: Path, entry):
    # plot_from_file wants more than one run
    for i in (1, 2):
        shutil.copytree(trained / "logs" / "staq" / "CartPole-v1_1", tmp_path / "logs" / "staq" / f"CartPole-v1_{i}")

    def plot(script: str, *args: str) -> str:
        return run(*entry[:-1], entry[-1] + script, *args, cwd=tmp_path)

    plot("plot_train", "-a", "staq", "-e", "CartPole-v1", "-f", "logs")
    output = plot("all_plots", "-a", "staq", "-e", "CartPole-v1", "-f", "logs", "--no-display", "-o", "results")
    assert "|CartPole-v1 |" in output
    plot("plot_from_file", "-i", "results.pkl", "-l", "StaQ", "-o", "figure.svg")
    assert list(tmp_path.glob("figure*svg"))


@pytest.mark.slow
def test_record_video(tmp_path: Path):
    """On MinAtar, which needs no display, with the policy and the wrapper that the hyperparameter file names."""
    pytest.importorskip("minatar")
    pytest.importorskip("moviepy")
    minatar = ["--algo", "staq", "--env", "MinAtar/Breakout-v1"]
    train = [*minatar, "-n", "300", "--eval-freq", "-1", "-params", "learning_starts:250", "policy_update_interval:10"]
    run("-m", "rl_zoo3.train", *train, cwd=tmp_path)
    args = [*minatar, "-f", "logs", "-n", "20", "-o"]
    run("-m", "rl_zoo3.record_video", *args, "videos", cwd=tmp_path)
    run("-m", "sb3_staq.zoo", "record_video", *args, "others", cwd=tmp_path, SB3_STAQ_NO_ZOO="1")
    for folder in ("videos", "others"):
        assert len(list((tmp_path / folder).glob("*staq*.mp4"))) == 1
    # The saved agent keeps its policy class
    agent = "logs/staq/MinAtar-Breakout-v1_1/MinAtar-Breakout-v1.zip"
    assert "Loading pretrained agent" in run("-m", "rl_zoo3.train", *train, "-i", agent, cwd=tmp_path)


def test_optimize(study: Path):
    """The parameters of a finished trial, converted again, start a training."""
    storage = ["--storage", "study.log", "--study-name", "study", "--trial-id", "1"]
    run("-m", "rl_zoo3.train", *TRAIN, *storage, cwd=study)
    backend = optuna.storages.journal.JournalFileBackend(str(study / "study.log"))
    trials = optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(backend)).trials
    config = saved_config(study / "logs" / "staq" / "CartPole-v1_2")
    expected = HYPERPARAMS_CONVERTER["staq"](trials[1].params)
    # Given on the command line as well, which has the last word
    del expected["policy_update_interval"]
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("module", ["load_from_hub", "push_to_hub", "record_training"])
def test_other_scripts(tmp_path: Path, module):
    if module == "push_to_hub" and not hasattr(
        importlib.import_module("huggingface_sb3.push_to_hub"), "generate_metadata"
    ):
        pytest.skip("this RL Zoo3 cannot import its own push_to_hub with this huggingface_sb3")
    assert "staq" in run("-m", f"rl_zoo3.{module}", "--help", cwd=tmp_path)


def test_benchmark(trained: Path):
    """The benchmark finds the trained agent; it only evaluates agents from within RL Zoo3's own checkout."""
    assert list(get_trained_models(str(trained / "logs")).values()) == [("staq", "CartPole-v1")]
    assert "usage" in run("-m", "rl_zoo3.benchmark", "--help", cwd=trained)


def her_kwargs_of(trial: optuna.trial.BaseTrial) -> dict:
    return {key: trial.params[key] for key in ("n_sampled_goal", "goal_selection_strategy")}


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("her", [False, True])
@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("seed", range(2))
def test_converter_agrees_with_sampler(env, her, n_envs, seed):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    additional_args = {"using_her_replay_buffer": her, "her_kwargs": {}}
    n_actions = {"CartPole-v1": 0, "Pendulum-v1": 1}[env]  # as RL Zoo3 counts: components of a Box
    sampled = HYPERPARAMS_SAMPLER["staq"](trial, n_actions=n_actions, n_envs=n_envs, additional_args=additional_args)
    assert HYPERPARAMS_CONVERTER["staq"](trial.params) == sampled
    assert ("replay_buffer_kwargs" in sampled) == her
    if her:
        assert sampled.pop("replay_buffer_kwargs") == her_kwargs_of(trial)
    # What a hyperparameter file might have and would not go with the search
    model = StaQ(
        "MlpPolicy",
        env,
        **{"logit_cache": False, "action_grid": "joint", "action_bins": 30, "buffer_size": 100, **sampled},
    )
    assert model.logit_cache == "auto"
    if n_actions:
        assert model.action_grid == "factored" and model.critic == "joint"
        assert model.kl_coef == f"rel_{trial.params['kl_factor']}" and model.ent_coef == "auto"
    else:
        first, last = (value_at("ent_coef", model.ent_coef, progress) for progress in (1.0, 0.0))
        assert first == pytest.approx(trial.params["ent_coef"])
        assert last == pytest.approx(trial.params["ent_coef"] * trial.params["ent_coef_decay"])
    soft, hard = (trial.params.get(name) for name in ("tau", "target_update_interval"))
    assert (soft is None) != (hard is None)
    assert (model.tau, model.target_update_interval) == (soft or 1.0, hard or 1)
    assert model.gamma == pytest.approx(1 - trial.params["one_minus_gamma"])
    assert model.batch_size == 2 ** trial.params["batch_size_pow"]
    # Up to one gradient step per environment step
    per_rollout = model.train_freq.frequency // trial.params["subsample_steps"]
    assert model.gradient_steps == max(per_rollout, 1) * n_envs <= model.train_freq.frequency * n_envs


def test_continued_trainings_keep_the_shapes_of_their_networks(tmp_path: Path):
    """... as RL Zoo3 does for other algorithms by dropping policy_kwargs; everything else is that of the file."""
    StaQ("MlpPolicy", "Pendulum-v1", action_bins=7, memory_size=3, n_critics=3).save(tmp_path / "agent.zip")
    arguments = dict(trained_agent=str(tmp_path / "agent.zip"), eval_freq=-1, verbose=0)
    manager = ExperimentManager(SimpleNamespace(), "staq", "Pendulum-v1", str(tmp_path), **arguments)
    model, hyperparams = manager.setup_experiment()  # type: ignore[misc]
    assert (model.action_bins, model.n_critics) == (7, 3) and hyperparams["action_bins"] == 5
    assert model.memory_size == hyperparams["memory_size"] == "auto"
    model.get_env().close()


def test_registered_once():
    """Both ways in and a second call leave one registration."""
    init = ExperimentManager.__init__
    sampler = HYPERPARAMS_SAMPLER["staq"]
    sb3_staq.zoo.register()
    assert ALGOS["staq"] is StaQ
    assert ExperimentManager.__init__ is init and HYPERPARAMS_SAMPLER["staq"] is sampler
    # One layer of wrapping
    assert not hasattr(init.__wrapped__, "__wrapped__")


def test_other_algorithms_are_left_alone(tmp_path: Path):
    args = SimpleNamespace()
    for algo, config in (("dqn", None), ("staq", "mine.yml")):
        manager = ExperimentManager(args, algo, "CartPole-v1", str(tmp_path), config=config)
        assert manager.config != str(sb3_staq.zoo.default_config())
    assert ExperimentManager(args, "staq", "CartPole-v1", str(tmp_path)).config == str(sb3_staq.zoo.default_config())


SETTINGS = {
    (path.name, env_id): hyperparams
    for path in sorted(sb3_staq.zoo.default_config().parent.glob("staq*.yml"))
    for env_id, hyperparams in yaml.safe_load(path.read_text()).items()
}


@pytest.mark.parametrize(("file", "env_id"), SETTINGS)
def test_every_entry_makes_a_model(file, env_id, tmp_path: Path):
    """The hyperparameter files have no misspelt argument, and their environments exist."""
    gym_id = {"default": "CartPole-v1", "atari": "BreakoutNoFrameskip-v4"}.get(env_id, env_id)
    try:
        gym.make(gym_id)
    except (gym.error.DependencyNotInstalled, ImportError, gym.error.NameNotFound) as error:
        pytest.skip(str(error))
    config = tmp_path / "config.yml"
    # Allocating a million observations is not what is tested
    config.write_text(yaml.safe_dump({gym_id: {**SETTINGS[file, env_id], "buffer_size": 100}}))
    args = SimpleNamespace()
    manager = ExperimentManager(args, "staq", gym_id, str(tmp_path), eval_freq=-1, config=str(config), verbose=0)
    model, _ = manager.setup_experiment()  # type: ignore[misc]
    assert isinstance(model, StaQ) and isinstance(model.get_env().unwrapped, DummyVecEnv)
    obs = model.get_env().reset()
    assert np.isfinite(model.predict(obs)[0]).all()
    if file == "staq_paper.yml":  # the paper divides by the logarithm of the number of actions
        (n_actions,) = model.policy.branches.sizes
        first, last = (value_at("ent_coef", model.ent_coef, progress) * np.log(n_actions) for progress in (1.0, 0.0))
        assert (first, last) == (pytest.approx(2.0, abs=1e-3), pytest.approx(0.4, abs=1e-3))
    model.get_env().close()
