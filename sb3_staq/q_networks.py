"""One critic, the dueling head, and ensembles of critics that are evaluated in one batched pass."""

import copy
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.func import functional_call, vmap
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sb3_staq.kernels import batched_linear, exporting, plain_batched_linear
from sb3_staq.mirror_descent import centre

Net = TypeVar("Net", bound="Critic")
SelfEnsemble = TypeVar("SelfEnsemble", bound="Ensemble")
Params = Mapping[str, th.Tensor]
# Held while a layer has other parameters in place of its own: another thread may want to use, copy or save it, or fork
_SWAPPING = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_SWAPPING.acquire, after_in_parent=_SWAPPING.release, after_in_child=_SWAPPING.release)


class DuelingHead(nn.Module):
    """
    Add up a value and centred advantages: ``Q(s,a) = V(s) + sum_d A_d(s,a_d)``, as branching dueling Q-networks do.

    Without centring, bins that are seldom taken keep stale values while V grows.

    :param branch_sizes: number of bins of each branch
    """

    def __init__(self, branch_sizes: Sequence[int]):
        super().__init__()
        self.branch_sizes = list(branch_sizes)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        Combine the outputs of the last layer.

        :param x: advantages and value, shape (..., sum(branch_sizes) + 1)
        :return: the terms of the sum, V shared equally by the branches, shape (..., sum(branch_sizes))
        """
        return x[..., -1:] / len(self.branch_sizes) + centre(x[..., :-1], self.branch_sizes)


class Critic(nn.Module):
    """
    A features extractor, then an MLP from ``n_inputs`` to ``n_outputs`` numbers.

    :param net_arch: sizes of its hidden layers
    :param layer_norm: whether these are normalised before their activations
    :param head: what follows the MLP, without parameters
    """

    def __init__(
        self,
        features_extractor: BaseFeaturesExtractor,
        n_inputs: int,
        n_outputs: int,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        layer_norm: bool,
        head: nn.Module | None = None,
    ):
        super().__init__()
        _check_extractor(features_extractor)
        self.features_extractor = features_extractor
        post_linear: list[type[nn.Module]] | None = [nn.LayerNorm] if layer_norm else None
        mlp = create_mlp(n_inputs, n_outputs, net_arch, activation_fn, post_linear_modules=post_linear)
        self.q_net = nn.Sequential(*mlp)
        if head is not None:
            self.q_net.append(head)
        # Each layer with the names of its parameters, which a batched pass needs
        layers = {"features_extractor": features_extractor, **{f"q_net.{i}": x for i, x in enumerate(self.q_net)}}
        self.layers = [(x, {leaf: f"{name}.{leaf}" for leaf, _ in x.named_parameters()}) for name, x in layers.items()]
        self.output_index = len(mlp)  # of the last layer with parameters

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """Compute the outputs at preprocessed observations, shape (batch, n_outputs)."""
        return self.q_net(self.features_extractor(obs))


def _check_extractor(features_extractor: nn.Module) -> None:
    """Refuse a features extractor that a stack of critics cannot hold."""
    found = ""
    names = [name for name, _ in features_extractor.named_parameters(remove_duplicate=False)]
    if list(features_extractor.buffers()):
        found = (
            "buffers (as BatchNorm has); expected none, use LayerNorm or GroupNorm instead, and for constants plain "
            "attributes that forward() moves to the device"
        )
    elif any(isinstance(param, nn.UninitializedParameter) for param in features_extractor.parameters()):
        found = "parameters without a shape; expected a first call in __init__, as nn.LazyLinear needs"
    elif len(list(features_extractor.parameters())) < len(names):
        found = "a parameter under several names; expected one name for each"
    if found:
        name = type(features_extractor).__name__
        raise ValueError(f"Invalid features_extractor_class={name}: it has {found}")


class QNetwork(Critic):
    """
    A critic with one output per bin. The last layer starts at zero, so the first policies are uniform.

    :param branch_sizes: number of bins of each branch
    :param net_arch: sizes of the hidden layers
    :param dueling: whether the outputs are those of :class:`DuelingHead`
    :param layer_norm: whether hidden layers are normalised before their activations
    """

    def __init__(
        self,
        features_extractor: BaseFeaturesExtractor,
        branch_sizes: Sequence[int],
        net_arch: list[int],
        activation_fn: type[nn.Module] = nn.ReLU,
        dueling: bool = False,
        layer_norm: bool = False,
    ):
        n_outputs, head = sum(branch_sizes), None
        if dueling:
            n_outputs, head = n_outputs + 1, DuelingHead(branch_sizes)
        n_inputs = features_extractor.features_dim
        super().__init__(features_extractor, n_inputs, n_outputs, net_arch, activation_fn, layer_norm, head)
        self.n_bins = sum(branch_sizes)
        for param in self.layers[self.output_index][0].parameters():
            nn.init.zeros_(param)


def _apply_copies(layer: nn.Module, params: dict[str, th.Tensor], x: Any, shared_input: bool) -> th.Tensor:
    """Apply N copies of any layer that differ only in their parameters, if possible in one pass."""
    if exporting():
        return _apply_one_by_one(layer, params, x, shared_input)
    in_dims = (0, None if shared_input else 0)
    with _SWAPPING:
        try:
            return vmap(lambda p, x: functional_call(layer, p, (x,)), in_dims, randomness="different")(params, x)
        except RuntimeError:  # recurrent layers, in-place writes, branches on values
            return _apply_one_by_one(layer, params, x, shared_input)


def _apply_one_by_one(layer: nn.Module, params: dict[str, th.Tensor], x: Any, shared_input: bool) -> th.Tensor:
    n_copies = len(next(iter(params.values())))
    copies = [{name: param[i] for name, param in params.items()} for i in range(n_copies)]
    return th.stack([_call_with(layer, p, x if shared_input else x[i]) for i, p in enumerate(copies)])


def _call_with(layer: nn.Module, params: dict[str, th.Tensor], x: Any) -> th.Tensor:
    """Call a layer with other parameters in place of its own, like ``functional_call``, which cannot be traced."""
    owners = [(layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in params]
    own: list[Any] = [owner._parameters[leaf] for owner, leaf in owners]
    try:
        for (owner, leaf), param in zip(owners, params.values(), strict=True):
            owner._parameters[leaf] = param  # type: ignore[assignment]
        return layer(x)
    finally:
        for (owner, leaf), old in zip(owners, own, strict=True):
            owner._parameters[leaf] = old


def batched_forward(
    net: Critic,
    params: Params,
    x: Any,
    start: int = 0,
    end: int | None = None,
    shared_input: bool = True,
    coef: th.Tensor | None = None,
) -> th.Tensor:
    """
    Evaluate N critics in one pass, or their weighted sum.

    :param net: gives the structure only
    :param params: parameters by name, each with a leading dimension N
    :param x: preprocessed observations, or the input of the layer ``start``
    :param start: index of the first layer to apply
    :param end: index of the first layer not to apply
    :param shared_input: whether all critics have the same input, else it has a leading dimension N
    :param coef: weights of the sum, shape (N,). Critics are linear from the output layer on, so it is taken there
    :return: shape (N, batch, n_outputs), or (batch, n_outputs) with ``coef``
    """
    traced = exporting()
    linear = plain_batched_linear if traced else batched_linear
    in_place = not traced and not th.is_grad_enabled()  # saves memory
    for i, (layer, names) in enumerate(net.layers[start:end], start):
        if not names:
            x = th.relu_(x) if in_place and isinstance(layer, nn.ReLU) else layer(x)
            continue
        if isinstance(layer, nn.Linear) and "bias" in names:
            x = linear(x, params[names["weight"]], params[names["bias"]])
            if coef is not None and i == net.output_index:
                x = th.tensordot(coef, x, dims=1)
        elif isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1 and len(names) == 2:
            one, zero = x.new_ones(layer.normalized_shape), x.new_zeros(layer.normalized_shape)
            x = th.layer_norm(x, layer.normalized_shape, one, zero, layer.eps)  # twice as fast as without these two
            x = th.addcmul(params[names["bias"]].unsqueeze(1), x, params[names["weight"]].unsqueeze(1))
        else:
            x = _apply_copies(layer, {leaf: params[name] for leaf, name in names.items()}, x, shared_input)
        shared_input = False
    return x


class Ensemble(nn.Module, Generic[Net]):
    """
    Several networks of one architecture, evaluated in one batched pass.

    :param nets: the members; their parameters are copied
    """

    def __init__(self, nets: list[Net]):
        super().__init__()
        self.net = copy.deepcopy(nets[0])  # a features extractor may hold one of the user's modules
        for name, param in self.net.named_parameters():
            param.data = th.stack([net.get_parameter(name).data for net in nets])
        self.params = dict(self.net.named_parameters())

    def frozen_copy(self: SelfEnsemble) -> SelfEnsemble:
        """Make a copy that is never trained."""
        try:
            return copy.deepcopy(self).requires_grad_(False).eval()
        except (NotImplementedError, RuntimeError) as error:
            name = type(self.net.features_extractor).__name__
            raise ValueError(
                f"Invalid features_extractor_class={name}: it cannot be copied ({error}); expected one that keeps "
                "no tensors of a forward pass, such as attention weights"
            ) from error

    # While one thread trains, others may copy, pickle or save

    def __deepcopy__(self: SelfEnsemble, memo: dict[int, Any]) -> SelfEnsemble:
        copied = memo[id(self)] = self.__new__(type(self))
        with _SWAPPING:
            vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        with _SWAPPING:
            return vars(copy.deepcopy(self, {id(param): param for param in self.parameters()}))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the parameters, like any module."""
        with _SWAPPING:
            return super().state_dict(*args, **kwargs)

    def follow(self: SelfEnsemble, online: SelfEnsemble, tau: float) -> None:
        """Move this Polyak average towards the networks that it is of, all parameters in one operation."""
        get_ema_multi_avg_fn(1.0 - tau)(list(self.params.values()), list(online.params.values()), None)


class CriticEnsemble(Ensemble[QNetwork]):
    """Several critics with one output per bin."""

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """Compute the Q-values of each member, shape (n_critics, batch, n_bins), at preprocessed observations."""
        return batched_forward(self.net, self.params, obs)

    def q_values(self, obs: PyTorchObs) -> th.Tensor:
        """Compute the mean of the members, shape (batch, n_bins), at preprocessed observations."""
        return self(obs).mean(dim=0)
