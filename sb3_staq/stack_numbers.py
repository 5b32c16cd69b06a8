"""The numbers of a stack as they are saved: in tensors, which anyone can load without running any code."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch as th

from sb3_staq.mirror_descent import StackWeights

NAMES = ("weights", "updates", "constants", "marked")
MARKED = ("candidate", "best")
# Stands for an ``ent_coef`` before the first policy update
NO_ENT_COEF = -1.0


def to_tensors(
    weights: StackWeights, updates: Sequence[float], n_updates: int, marked: Mapping[str, tuple[int, float]]
) -> dict[str, th.Tensor]:
    """
    Return the numbers as tensors.

    :param weights: weights of the logit rule
    :param updates: for each entry, the policy update that pushed it
    :param n_updates: number of policy updates so far
    :param marked: when averages were taken, and the sum of their weights in the logits, see ``MARKED``
    :return: tensors by name, see ``NAMES``
    """
    ent_coef = NO_ENT_COEF if weights.ent_coef is None else weights.ent_coef
    return {
        "weights": _to_floats(weights.values),
        "updates": th.tensor(updates, dtype=th.float32),
        "constants": _to_floats([weights.scale, ent_coef, float(n_updates)]),
        "marked": _to_floats([float(x) for name in MARKED for x in marked[name]]),
    }


def of_version_0_1(state: dict[str, Any]) -> dict[str, th.Tensor]:
    """
    Give the tensors for what version 0.1.0 saved, which is a dictionary of values, scale and ent_coef.

    :param state: the weights; there was one update for each
    :return: as from :func:`to_tensors`
    """
    weights = StackWeights("exact", 1)
    weights.values, weights.scale, weights.ent_coef = state["values"], state["scale"], state.get("ent_coef")
    return to_tensors(weights, range(1, len(weights) + 1), len(weights), dict.fromkeys(MARKED, (0, 0.0)))


def from_tensors(
    tensors: Iterable[th.Tensor], weights: StackWeights
) -> tuple[list[float], int, dict[str, tuple[int, float]]]:
    """
    Restore the numbers, and load those of the logit rule into ``weights``.

    :param tensors: in the order of ``NAMES``
    :param weights: changed in place
    :return: the policy updates that pushed the entries, the number of policy updates so far, and the marked averages
    :raise ValueError: if they cannot belong together
    """
    values, updates, constants, marked = tensors
    valid = updates.dim() == 1 and values.shape[1:] == constants.shape[1:] == marked.shape[1:] == (3,)
    valid = valid and len(values) <= len(updates) and len(constants) == 3 and len(marked) == 2 * len(MARKED)
    valid = valid and all(bool(th.isfinite(x).all()) for x in (values, updates, constants[::2], marked))
    if not valid or th.isinf(constants[1]).any():
        raise ValueError(
            "The saved stack is damaged: expected finite numbers, and at most one weight for each critic, got "
            f"weights={values.tolist()}, updates={updates.tolist()}, constants={constants.tolist()}, "
            f"marked={marked.tolist()}"
        )
    scale, ent_coef, n_updates = _from_floats(constants)
    weights.values, weights.scale, weights.ent_coef = _from_floats(values), scale, ent_coef if ent_coef >= 0 else None
    taken, factors = map(round, _from_floats(marked[::2])), _from_floats(marked[1::2])
    return updates.tolist(), round(n_updates), dict(zip(MARKED, zip(taken, factors, strict=True), strict=True))


def _to_floats(values: Sequence[float]) -> th.Tensor:
    """Split doubles into exact sums of three floats, shape (n, 3): some devices have no doubles."""
    rest = th.tensor(values, dtype=th.float64).reshape(-1)
    parts = []
    for _ in range(3):
        parts.append(rest.float())
        rest = rest - parts[-1].double()
    return th.stack(parts, dim=1)


def _from_floats(parts: th.Tensor) -> list[float]:
    return parts.cpu().double().sum(dim=1).tolist()
