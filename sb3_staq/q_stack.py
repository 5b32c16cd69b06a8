"""The growing stack of frozen critics, whose weighted sums are the logits of several policies, up to a factor.

- "last", the policy that learns, weights the newest ``memory_size`` critics by the logit rule.
- "average" is the plain average over a window that grows with the training, thinned evenly in time.
- "candidate" and "best" are averages taken earlier, see :meth:`FrozenCritics.propose`.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_staq import stack_numbers
from sb3_staq.interrupts import interrupts_deferred
from sb3_staq.kernels import allocate, exporting
from sb3_staq.mirror_descent import LogitRule, PolicyUpdate, StackWeights, averaged_updates
from sb3_staq.q_networks import CriticEnsemble, batched_forward

# Activations per linear layer and chunk: on a CPU 2 MB, which stay in its cache; a GPU needs larger chunks
CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 2**19, 2**25
# Critics with at most this share of the weights are skipped: 256 of them make 2^-24, the resolution of a float
NEGLIGIBLE_WEIGHT = 2.0**-32
# Shorter gaps of critics without weight are evaluated too: splitting the batched pass there costs about as much
GAP = 4
NEW = -1


class FrozenCritics(nn.ModuleList):
    """
    The stack of frozen critics; each entry is the ensemble that one policy update pushed.

    The logits are ``weights.scale`` times the weighted sum ``S(s) = sum_i w_i Q_i(s)``. Entries that the logit rule
    weights come first, then those that only the average needs. ``state_dict`` loads into a stack of any size. Code that
    changes parameters in place must call :meth:`gather`.

    :param template: an ensemble with the architecture of the entries
    :param logit_rule: a name or custom weights by age, see :func:`sb3_staq.mirror_descent.make_logit_rule`
    :param memory_size: the largest number of entries that the logit rule weights ("exact" has no limit)
    :param average_window: the share of the policy updates so far that the average covers, in (0, 1]
    :param average_size: the largest number of entries in an average; 0 keeps none for it
    """

    def __init__(
        self,
        template: CriticEnsemble,
        logit_rule: LogitRule,
        memory_size: int,
        average_window: float,
        average_size: int,
    ):
        super().__init__()
        self.weights = StackWeights(logit_rule, memory_size)
        self.average_window = average_window
        self.average_size = average_size
        self.n_updates = 0
        # The policy updates at which these averages were taken (0: none yet), and their weights' sums in the logits
        self.marked = {"candidate": (0, 0.0), "best": (0, 0.0)}
        # For each entry, the policy update that pushed it
        self.updates: list[float] = []
        # Changes with every push and load, which make earlier results of the stack invalid
        self.version = 0
        self.n_bins = template.net.n_bins
        # The structure of an entry, without memory for its parameters; in a list, so that it is not a submodule
        self._template = [template.frozen_copy()]
        for param in self._template[0].parameters():
            param.data = param.data.new_empty(0)
        # The parameters of entry i are views of row i of these blocks, so that one batched pass reads them all
        self._blocks = {name: param.new_empty(0, *param.shape) for name, param in template.net.named_parameters()}
        self._coefs: dict[str, tuple[th.Tensor, list[range]]] = {}
        linear = [layer.weight for layer in template.net.q_net if isinstance(layer, nn.Linear)]
        self._widest_layer = max(len(weight) * max(weight.shape[1:]) for weight in linear)

    @property
    def newest(self) -> CriticEnsemble:
        """The entry that the last policy update pushed."""
        return self[self.updates.index(max(self.updates))]

    def forward(self, obs: PyTorchObs, weighting: str = "last") -> th.Tensor:
        """
        Compute the weighted sum ``S`` of the stack.

        :param obs: preprocessed observations
        :param weighting: "last", "average", "candidate" or "best"
        :return: shape (batch, n_bins); zero for an empty stack
        """
        first = next(iter(obs.values())) if isinstance(obs, dict) else obs
        coefs, runs = self._factors(weighting)
        elements = CHUNK_ELEMENTS if first.device.type == "cpu" else GPU_CHUNK_ELEMENTS
        chunk = max(1, len(coefs) if exporting() else elements // (self._widest_layer * max(1, len(first))))
        total = first.new_zeros(first.shape[0], self.n_bins, dtype=th.float32)
        with th.autocast(first.device.type, enabled=False):
            for start, stop in [(i, min(i + chunk, run.stop)) for run in runs for i in run[::chunk]]:
                rows = slice(start, stop)
                params = {name: block[rows].flatten(0, 1) for name, block in self._blocks.items()}
                total = total + batched_forward(self._template[0].net, params, obs, coef=coefs[rows].flatten())
        return total

    def coefs(self, weighting: str) -> th.Tensor:
        """Return the factors of a weighting, shape (entries up to the last with one, n_critics)."""
        return self._factors(weighting)[0]

    def _factors(self, weighting: str) -> tuple[th.Tensor, list[range]]:
        """Return the factors and the ranges of rows to evaluate: an average may skip most of the rule's entries."""
        cached = self._coefs  # a push in another thread replaces it
        if weighting in cached:
            return cached[weighting]
        block = next(iter(self._blocks.values()))
        values = self._rule_values() if weighting == "last" else self._average_values(weighting)
        threshold = NEGLIGIBLE_WEIGHT * sum(map(abs, values))
        values = [value if abs(value) > threshold else 0.0 for value in values]
        while values and values[-1] == 0.0:
            values.pop()
        # The mean of an ensemble is a weighted sum as well: each network gets a factor
        with th.inference_mode(False):  # they are cached, and gradients may be asked for later
            coefs = block.new_tensor(values)[:, None].repeat(1, block.shape[1]) / block.shape[1]
        runs: list[range] = []
        for row, value in enumerate(values):
            if value != 0.0:
                start = runs.pop().start if runs and row - runs[-1].stop < GAP else row
                runs.append(range(start, row + 1))
        if not exporting():  # a cached trace would differ from the next one
            cached[weighting] = coefs, runs
        return coefs, runs

    def _rule_values(self) -> list[float]:
        """Return the weights of the logit rule, in the order of the entries."""
        weights = self.weights.values
        recent = self.updates[: len(weights)]
        of_update = dict(zip(sorted(recent), weights, strict=False))  # a damaged file may repeat an update
        return [of_update[update] for update in recent]

    def _average_values(self, weighting: str) -> list[float]:
        """Return the weights of an average, in the order of the entries; their sum is that of the rule at its time."""
        at, factor = self.marked.get(weighting, (0, 0.0))
        total = factor / self.weights.scale if at > 0 else self.weights.total
        at = at or self.n_updates
        chosen = averaged_updates(at, self.average_window, max(2, self.average_size))
        in_average = [update in chosen for update in self.updates]
        n = sum(in_average)
        return [total / n if x else 0.0 for x in in_average] if n > 0 else self._rule_values()

    def propose(self, accept: bool) -> None:
        """
        Take the current average as the candidate. The critics of the candidate and the best average stay on the stack.

        :param accept: whether the previous candidate becomes the best average
        """
        if accept:
            self.marked["best"] = self.marked["candidate"]
        self.marked["candidate"] = self.n_updates, self.weights.scale * self.weights.total
        self._coefs = {}

    def push(
        self, critics: CriticEnsemble, kl_coef: float, ent_coef: float
    ) -> tuple[PolicyUpdate, list[CriticEnsemble]]:
        """
        Freeze a copy of the critics on the stack (the policy update), as a whole or not at all.

        :return: the change of the logit rule's weighted sum, and the critics that are deleted from that sum
        """
        # Prepare everything that can fail ...
        new_params = {name: param.detach() for name, param in critics.net.named_parameters()}
        if {name: x.shape for name, x in new_params.items()} != {name: x.shape[1:] for name, x in self._blocks.items()}:
            raise ValueError("Invalid critics: expected the architecture of the stack")
        weights, n_updates = copy.copy(self.weights), self.n_updates + 1
        update = weights.push(kl_coef, ent_coef)
        n_old = len(self.weights)
        deleted = sorted(range(n_old), key=self.updates.__getitem__)[: len(update.deleted_weights)]  # the oldest
        averages = [n_updates, *(n for n, _ in self.marked.values() if n > 0)] if self.average_size else []
        needed = {x for n in averages for x in averaged_updates(n, self.average_window, self.average_size)}
        averaged = [i for i in [*range(n_old, len(self)), *deleted] if self.updates[i] in needed]
        recent = [*(i for i in range(n_old) if i not in deleted), NEW]
        layout = _arrange(recent, 0) + _arrange(averaged, len(recent))
        moved = {row: source for row, source in enumerate(layout) if row != source}
        blocks = self._reserved(len(layout))
        copies = {
            (name, row): new_params[name] if source == NEW else block[source].clone()
            for name, block in self._blocks.items()
            for row, source in moved.items()
        }
        entries = [self._template[0].frozen_copy() for _ in range(len(layout) - len(self))]
        deleted_critics = [self[i].frozen_copy() for i in deleted]
        updates = [n_updates if source == NEW else self.updates[source] for source in layout]

        # ... then commit
        with interrupts_deferred(), th.no_grad():
            n_linked = len(self) if blocks is self._blocks else 0
            self._blocks = blocks
            for (name, row), values in copies.items():
                blocks[name][row].copy_(values)
            del self[len(layout) :]
            self.extend(entries)
            self._link(n_linked)
            self.weights, self.updates, self.n_updates = weights, updates, n_updates
            self._coefs, self.version = {}, self.version + 1
        return update, deleted_critics

    def __getitem__(self, index: Any) -> Any:  # a slice would otherwise make a new stack, without weights
        return list(self)[index] if isinstance(index, slice) else super().__getitem__(index)

    def _reserved(self, n_entries: int) -> dict[str, th.Tensor]:
        """Return blocks with room for ``n_entries``: they grow by doubling, so that pushes take constant time."""
        capacity = len(next(iter(self._blocks.values())))
        if n_entries <= capacity:
            return self._blocks
        roomy = 2 * capacity
        if self.weights.logit_rule != "exact":
            n_averages = 1 + sum(n > 0 for n, _ in self.marked.values())
            roomy = min(roomy, self.weights.memory_size + n_averages * self.average_size)
        blocks = {name: allocate(block, max(n_entries, roomy)) for name, block in self._blocks.items()}
        for name, block in self._blocks.items():
            blocks[name][:capacity].copy_(block)
        return blocks

    def _link(self, start: int = 0) -> None:
        """Turn the parameters of the entries from ``start`` on into views of the blocks."""
        for i in range(start, len(self)):
            entry: Any = self[i]
            for name, param in entry.net.named_parameters():
                param.data = self._blocks[name][i]

    # Saving, loading, copying and moving: the blocks remain the only copy of the parameters

    def gather(self) -> None:
        """Take over parameters of the entries that other code has replaced or changed in place."""
        entry: Any
        for i, entry in enumerate(self):
            for name, param in entry.net.named_parameters():
                self._blocks[name][i].copy_(param.data)
        self._link()
        self._coefs, self.version = {}, self.version + 1

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        tensors = stack_numbers.to_tensors(self.weights, self.updates, self.n_updates, self.marked)
        destination.update({f"{prefix}{name}": value for name, value in tensors.items()})

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> Any:
        """Return copies, unlike other modules: saving a view would save the whole block, unused rows included."""
        state = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars, **kwargs)
        for key, value in state.items():
            if key.startswith(prefix) and not keep_vars:
                state[key] = value.clone()
        return state

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        if local_metadata.get("assign_to_params_buffers"):
            raise ValueError(
                "Invalid assign=True: expected False, as the parameters of the stack are views of larger blocks"
            )
        old = state_dict.pop(f"{prefix}_extra_state", None)  # of version 0.1.0
        if old is not None:
            state_dict.update({f"{prefix}{name}": x for name, x in stack_numbers.of_version_0_1(old).items()})
        tensors = [state_dict.pop(f"{prefix}{name}", None) for name in stack_numbers.NAMES]
        missing = [name for name, tensor in zip(stack_numbers.NAMES, tensors, strict=True) if tensor is None]
        missing_keys.extend(f"{prefix}{name}" for name in missing)
        if not missing:
            self.updates, self.n_updates, self.marked = stack_numbers.from_tensors(tensors, self.weights)
            del self[:]
            self._blocks = self._reserved(len(self.updates))
            self.extend(self._template[0].frozen_copy() for _ in self.updates)
            self._link()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        self._coefs, self.version = {}, self.version + 1

    def _apply(self, fn: Callable[[th.Tensor], th.Tensor], recurse: bool = True) -> "FrozenCritics":
        super()._apply(fn, recurse)
        self._template[0]._apply(fn)
        self._blocks = {name: fn(block) for name, block in self._blocks.items()}
        self._coefs = {}
        self._link()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_modules": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.extend(self._template[0].frozen_copy() for _ in self.updates)
        self._link()


def _arrange(sources: Sequence[int], start: int) -> list[int]:
    """Assign entries to the rows from ``start`` on, so that as few as possible change their row."""
    rows = range(start, start + len(sources))
    free = iter(source for source in sources if source not in rows)
    return [row if row in sources else next(free) for row in rows]
