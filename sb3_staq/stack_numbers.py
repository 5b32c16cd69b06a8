"""The numbers of a stack as they stand in files: in tensors, which everybody can load without running anything."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch as th

from sb3_staq.mirror_descent import StackWeights

NAMES = ("weights", "updates", "constants")
# Stands for an ``ent_coef`` before the first policy update
NO_ENT_COEF = -1.0


def to_tensors(
    weights: StackWeights, updates: Sequence[float], n_updates: int, best_update: int = 0, best_factor: float = 0.0
) -> dict[str, th.Tensor]:
    """
    Give the numbers as tensors.

    :param weights: of the logit rule
    :param updates: the policy updates that pushed the entries
    :param n_updates: number of policy updates so far
    :param best_update: when the best average was taken, 0 if none was
    :param best_factor: the sum of its weights in the logits
    :return: tensors by name, see ``NAMES``
    """
    ent_coef = NO_ENT_COEF if weights.ent_coef is None else weights.ent_coef
    return {
        "weights": _to_floats(weights.values),
        "updates": th.tensor(updates, dtype=th.float32),
        "constants": _to_floats([weights.scale, ent_coef, float(n_updates), float(best_update), best_factor]),
    }


def of_version_0_1(state: dict[str, Any]) -> dict[str, th.Tensor]:
    """
    Give the tensors for what version 0.1.0 saved, which is a dictionary of values, scale and ent_coef.

    :param state: the weights; there was one update for each
    :return: as of :func:`to_tensors`
    """
    weights = StackWeights("exact", 1)
    weights.values, weights.scale, weights.ent_coef = state["values"], state["scale"], state.get("ent_coef")
    return to_tensors(weights, range(1, len(weights) + 1), len(weights))


def from_tensors(tensors: Iterable[th.Tensor], weights: StackWeights) -> tuple[list[float], int, int, float]:
    """
    Take the numbers, and put those of the logit rule in place.

    :param tensors: in the order of ``NAMES``
    :param weights: changed in place
    :return: the policy updates that pushed the entries, their number so far, and what is known of the best average
    :raise ValueError: if they cannot belong together
    """
    values, updates, constants = tensors
    valid = updates.dim() == 1 and values.shape[1:] == constants.shape[1:] == (3,)
    valid = valid and len(values) <= len(updates) and len(constants) == 5
    valid = valid and all(bool(th.isfinite(x).all()) for x in (values, updates, constants[[0, *range(2, 5)]]))
    if not valid or th.isinf(constants[1]).any():
        raise ValueError(
            "The saved stack is damaged: expected finite numbers, and at most one weight for each critic, got "
            f"weights={values.tolist()}, updates={updates.tolist()}, constants={constants.tolist()}"
        )
    scale, ent_coef, n_updates, best_update, best_factor = _from_floats(constants)
    weights.values, weights.scale, weights.ent_coef = _from_floats(values), scale, ent_coef if ent_coef >= 0 else None
    return updates.tolist(), round(n_updates), round(best_update), best_factor


def _to_floats(values: Sequence[float]) -> th.Tensor:
    """Doubles as exact sums of three floats, shape (n, 3): some devices have no doubles."""
    rest = th.tensor(values, dtype=th.float64).reshape(-1)
    parts = []
    for _ in range(3):
        parts.append(rest.float())
        rest = rest - parts[-1].double()
    return th.stack(parts, dim=1)


def _from_floats(parts: th.Tensor) -> list[float]:
    return parts.cpu().double().sum(dim=1).tolist()
