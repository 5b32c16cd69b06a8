"""
Registration with RL Zoo3, done by importing this module; the start-up hook imports it together with ``rl_zoo3``.

``python -m sb3_staq.zoo train ...`` runs RL Zoo3's scripts where there is no hook: because it is switched off, or the
package is used from a checkout.
"""

import argparse
import functools
import runpy
import sys
from pathlib import Path
from typing import Any

import optuna
from rl_zoo3 import exp_manager
from rl_zoo3.hyperparams_opt import (
    HYPERPARAMS_CONVERTER,
    HYPERPARAMS_SAMPLER,
    convert_offpolicy_params,
    sample_her_params,
)
from rl_zoo3.utils import ALGOS

from sb3_staq import StaQ
from sb3_staq.minatar import register_envs
from sb3_staq.policies import SHAPE_ARGUMENTS

SCRIPTS = (
    *("train", "enjoy", "record_video"),  # record_training and benchmark start these in processes of their own
    *("plot_train", "plot_from_file", "all_plots", "load_from_hub", "push_to_hub"),
)


def default_config() -> Path:
    """Return the hyperparameter file, which is inside the installed package but next to the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "hyperparams" / "staq.yml"
    return installed if installed.is_file() else package.parent / "hyperparams" / "staq.yml"


def sample_staq_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sample hyperparameters of StaQ.

    :param trial: Optuna trial
    :param n_actions: above 0 for a Box, which is searched with joint critics and an automatic ``ent_coef``
    :param n_envs: number of environments, which share the gradient steps
    :param additional_args: tells whether HER is used, and its arguments
    :return: arguments for the constructor
    """
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    # From 2**5=32 to 2**10=1024
    batch_size_pow = trial.suggest_int("batch_size_pow", 5, 10)
    train_freq = trial.suggest_int("train_freq", 1, 10)
    hyperparams = {
        "one_minus_gamma": one_minus_gamma,
        "batch_size_pow": batch_size_pow,
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.002, log=True),
        "train_freq": train_freq,
        # One gradient step per `subsample_steps` environment steps, counted over all `n_envs` environments
        "n_envs": trial.suggest_int("n_envs", n_envs, n_envs),
        "subsample_steps": trial.suggest_int("subsample_steps", 1, min(train_freq, 8)),
        "critic_reduction": trial.suggest_categorical("critic_reduction", ["mean", "min"]),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium", "big"]),
    }
    if n_actions > 0:
        hyperparams |= {
            "action_bins": trial.suggest_int("action_bins", 3, 11),
            "kl_factor": trial.suggest_float("kl_factor", 0.1, 30.0, log=True),
            "target_entropy": trial.suggest_float("target_entropy", 0.1, 0.7),
            "memory_size": trial.suggest_int("memory_size", 2, 50, log=True),
            "policy_update_interval": trial.suggest_int("policy_update_interval", 20, 1000, log=True),
            "tau": trial.suggest_float("tau", 0.001, 0.08, log=True),
        }
    else:
        hyperparams |= {
            "kl_coef": trial.suggest_float("kl_coef", 0.001, 100.0, log=True),
            "ent_coef": trial.suggest_float("ent_coef", 0.001, 5.0, log=True),
            # The share of ent_coef that is left at the end
            "ent_coef_decay": trial.suggest_float("ent_coef_decay", 0.01, 1.0, log=True),
            "memory_size": trial.suggest_int("memory_size", 5, 300, log=True),
            "policy_update_interval": trial.suggest_int("policy_update_interval", 10, 5000, log=True),
            "soft_targets": trial.suggest_categorical("soft_targets", [True, False]),
            "exploration_final_eps": trial.suggest_float("exploration_final_eps", 0, 0.2),
        }
        if hyperparams["soft_targets"]:
            hyperparams["tau"] = trial.suggest_float("tau", 0.001, 0.08, log=True)
        else:
            hyperparams["target_update_interval"] = trial.suggest_int("target_update_interval", 10, 2000, log=True)

    # Display true values
    trial.set_user_attr("gamma", 1 - one_minus_gamma)
    trial.set_user_attr("batch_size", 2**batch_size_pow)

    if additional_args["using_her_replay_buffer"]:
        hyperparams = sample_her_params(trial, hyperparams, additional_args["her_kwargs"])

    return convert_staq_params(hyperparams)


def convert_staq_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Convert sampled hyperparameters to arguments.

    :param sampled_params: what ``sample_staq_params`` sampled, or the parameters of a finished trial
    :return: arguments for the constructor
    """
    hyperparams = convert_offpolicy_params(sampled_params)
    hyperparams["gradient_steps"] *= hyperparams.pop("n_envs")
    # Whatever the hyperparameter file says: the cheaper evaluation of the stack; soft target updates at each gradient
    # step, or hard ones at the interval
    hyperparams["logit_cache"] = "auto"
    hyperparams.pop("soft_targets", None)
    if "tau" in hyperparams:
        hyperparams["target_update_interval"] = 1
    else:
        hyperparams["tau"] = 1.0
    if "kl_factor" in hyperparams:
        hyperparams |= {"kl_coef": f"rel_{hyperparams.pop('kl_factor')}", "ent_coef": "auto"}
        hyperparams |= {"critic": "joint", "action_grid": "factored"}
    else:
        ent_coef = hyperparams["ent_coef"]
        hyperparams["ent_coef"] = f"lin_{ent_coef}_{ent_coef * hyperparams.pop('ent_coef_decay')}"
    # A finished trial has HER's arguments among all the others
    her_keys = {"n_sampled_goal", "goal_selection_strategy"} & hyperparams.keys()
    her_kwargs = {key: hyperparams.pop(key) for key in her_keys}
    if her_kwargs:
        hyperparams["replay_buffer_kwargs"] = her_kwargs
    return hyperparams


def register() -> None:
    """Register algorithm, hyperparameter file and search space with RL Zoo3. Doing it again changes nothing."""
    if ALGOS.get("staq") is StaQ:
        return
    ALGOS["staq"] = StaQ
    HYPERPARAMS_SAMPLER["staq"] = sample_staq_params
    HYPERPARAMS_CONVERTER["staq"] = convert_staq_params
    _adapt_experiment_manager()
    register_envs()


def _adapt_experiment_manager() -> None:
    manager = exp_manager.ExperimentManager
    original_init, original_load = manager.__init__, manager._load_pretrained_agent

    # RL Zoo3 looks for the hyperparameters of all algorithms in its own folder, where ours are not
    @functools.wraps(original_init)
    def init(self: Any, args: Any, algo: str, *rest: Any, config: str | None = None, **kwargs: Any) -> None:
        config = config or (str(default_config()) if algo == "staq" else None)
        original_init(self, args, algo, *rest, config=config, **kwargs)  # type: ignore[misc]

    # RL Zoo3 continues with the saved model's networks, whose shapes other algorithms have in policy_kwargs
    @functools.wraps(original_load)
    def load(self: exp_manager.ExperimentManager, hyperparams: dict[str, Any], env: Any) -> Any:
        if self.algo == "staq":
            hyperparams = {name: value for name, value in hyperparams.items() if name not in SHAPE_ARGUMENTS}
        return original_load(self, hyperparams, env)

    manager.__init__, manager._load_pretrained_agent = init, load  # type: ignore[method-assign]


def main() -> None:
    """Run one of RL Zoo3's scripts in this process, in which StaQ is registered."""
    parser = argparse.ArgumentParser(prog="python -m sb3_staq.zoo", description=main.__doc__)
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script, for instance --help")
    args = parser.parse_args()
    sys.argv[1:] = args.arguments
    package = "rl_zoo3.plots" if "plot" in args.script else "rl_zoo3"
    runpy.run_module(f"{package}.{args.script}", run_name="__main__", alter_sys=True)


register()

if __name__ == "__main__":
    main()
