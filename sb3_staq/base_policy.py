"""The base of the policy: what training needs from its critics, and SB3's conventions, but not how it acts."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import get_device

from sb3_staq.action_spaces import Branches
from sb3_staq.main_effects import SampledActions, StateActionCritics, Sweep, expected_q_values
from sb3_staq.mirror_descent import expected_value
from sb3_staq.observations import in_parts, not_finite, place
from sb3_staq.plain_data import load_policy, save_policy
from sb3_staq.q_networks import CriticEnsemble
from sb3_staq.q_stack import FrozenCritics
from sb3_staq.save_util import PathOrFile

CRITIC_REDUCTIONS: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "mean": partial(th.mean, dim=0),
    "min": partial(th.amin, dim=0),
}
SelfPolicy = TypeVar("SelfPolicy", bound="CriticPolicy")


class CriticPolicy(BasePolicy):
    """An SB3 policy with critics that are trained and a stack of frozen ones."""

    branches: Branches
    critic_reduction: str
    critics: CriticEnsemble | StateActionCritics
    critics_target: CriticEnsemble | StateActionCritics
    main_effects: CriticEnsemble | None
    main_effects_target: CriticEnsemble | None
    frozen_critics: FrozenCritics
    n_obs_elements: int  # number of elements of a preprocessed observation

    # Learning

    def preprocess(self, obs: PyTorchObs) -> PyTorchObs:
        """
        Convert observations to the critics' input.

        :param obs: observations as environments and replay buffers give them (images channel-first)
        :return: floats, images scaled, discrete observations one-hot encoded
        """
        return preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images)  # type: ignore[return-value]

    @property
    def additive_critics(self) -> CriticEnsemble:
        """
        The critics that a policy update freezes: the online critics, or the Polyak average of the main effects.

        Main effects are small compared with the values that they are learnt from: without the average, successive
        policies would differ by the noise of the gradient steps.
        """
        critics = self.critics if self.main_effects_target is None else self.main_effects_target
        assert isinstance(critics, CriticEnsemble)
        return critics

    @th.no_grad()
    def q_values(self, critics: CriticEnsemble, obs: PyTorchObs) -> th.Tensor:
        """Compute the mean Q-values of an ensemble, such as an entry of the stack: shape (batch, n_bins)."""
        with th.autocast(self.device.type, enabled=False):  # the policy keeps its full precision
            return in_parts(lambda part: critics.q_values(self.preprocess(part)), obs, self.n_obs_elements)

    def action_values(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        Compute the Q-values of stored actions with the online critics.

        :param actions: stored actions, shape (batch, action_dim)
        :return: shape (n_critics, batch)
        """
        obs, branches = self.preprocess(obs), self.branches
        if isinstance(self.critics, StateActionCritics):
            return self.critics(obs, branches.inputs(actions))
        q_values = self.critics(obs)
        chosen = branches.columns(branches.encode(actions)).expand(len(q_values), -1, -1)
        return q_values.gather(2, chosen).sum(dim=2)

    @th.no_grad()
    def expected_q(
        self, obs: PyTorchObs, log_prob: th.Tensor, actions: SampledActions | None
    ) -> tuple[th.Tensor, Sweep | None]:
        """
        Compute ``E_{a~pi}[Q(s,a)]`` with the target critics, reduced to one value per state.

        :param log_prob: log-probabilities of the policy there, shape (batch, n_bins)
        :param actions: actions drawn from the policy, for state-action critics
        :return: the expectation, shape (batch,), exact for additive critics; and the sweep of state-action critics,
            which are evaluated at the drawn actions, else None
        """
        obs = self.preprocess(obs)
        reduce = CRITIC_REDUCTIONS[self.critic_reduction]
        if isinstance(self.critics_target, StateActionCritics):
            assert actions is not None
            expected, sweep = expected_q_values(self.critics_target, obs, actions, len(self.branches.sizes))
            return reduce(expected), sweep
        return reduce(expected_value(log_prob, self.critics_target(obs))), None

    def update_targets(self, tau: float) -> None:
        """Move the target critics towards the online ones."""
        self.critics_target.follow(self.critics, tau)  # type: ignore[arg-type]

    def average_main_effects(self, tau: float) -> None:
        """Move the average of the main effects, if there are any, towards the online ones."""
        if self.main_effects is not None and self.main_effects_target is not None:
            self.main_effects_target.follow(self.main_effects, tau)

    # Conventions of SB3

    def obs_to_tensor(self, observation: Any) -> tuple[PyTorchObs, bool]:
        """Convert as SB3 does, but accept nested lists for images, too, and refuse numbers that are not finite."""
        parts = observation if isinstance(observation, dict) else {"": observation}
        arrays = {key: np.asarray(value) for key, value in parts.items()}
        for key, array, index in not_finite(arrays):
            raise ValueError(
                "Invalid observation: expected finite numbers in single precision, got "
                f"observation{place(key, index)} = {array[tuple(index)]}"
            )
        return super().obs_to_tensor(arrays if isinstance(observation, dict) else arrays[""])

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """Scale actions of a Box to stored ones: [low, high] to [-1, 1], 0 where the bounds are equal."""
        if not isinstance(self.action_space, spaces.Box):
            return action
        low, high = self.action_space.low, self.action_space.high
        free = high > low
        return np.where(free, 2.0 * ((action - low) / np.where(free, high - low, 1.0)) - 1.0, 0.0)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """Scale stored actions of a Box to its bounds, and clip rounding errors."""
        if not isinstance(self.action_space, spaces.Box):
            return scaled_action
        return np.clip(super().unscale_action(scaled_action), self.action_space.low, self.action_space.high)

    def set_training_mode(self, mode: bool) -> None:
        """
        Record the mode, which changes nothing.

        Only frozen critics act. They and the targets stay in evaluation mode, and the online critics in training mode,
        whatever is set here or by ``train()`` and ``eval()``.
        """
        self.training = mode

    def train(self: SelfPolicy, mode: bool = True) -> SelfPolicy:
        """Record the mode, see :meth:`set_training_mode`."""
        self.set_training_mode(mode)
        return self

    def load_from_vector(self, vector: np.ndarray) -> None:
        """
        Load all parameters, also those of the frozen critics, from a 1D vector of ``parameters_to_vector``.

        The weights of the stack, which are not parameters, stay as they are.
        """
        super().load_from_vector(vector)
        self.frozen_critics.gather()

    def save(self, path: PathOrFile) -> None:  # type: ignore[override]
        """Save the policy with its whole stack. An existing file is replaced once the new one is complete."""
        save_policy(path, self.state_dict(), self._get_constructor_parameters())

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfPolicy],
        path: PathOrFile,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        weights_only: bool = False,
    ) -> SelfPolicy:
        """
        Load a policy from a file.

        :param custom_objects: arguments of the policy that replace those in the file
        :param weights_only: for files from others: run no code from the file, as in ``StaQ.load``
        :raise ValueError: if the file is damaged; with ``weights_only`` also if arguments have to be given
        """
        state_dict, arguments = load_policy(path, device, custom_objects or {}, weights_only)
        policy = cls(**arguments)
        policy.load_state_dict(state_dict)
        return policy.to(get_device(device))
