"""The critics: one Q-network, the ensemble that is trained, and the growing stack of frozen ones that is the policy.

All members of an ensemble have the same architecture, so their parameters are stacked along a leading dimension and one
batched pass serves them all. The frozen stack goes one step further: for each layer a single block of memory holds
the parameters of all its entries, and the parameters of the entries in the ``nn.ModuleList`` are views of it.
"""

import contextlib
import copy
import inspect
import itertools
import math
import mmap
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.func import functional_call, vmap

from sb3_staq.mirror_descent import LogitRule, PolicyUpdate, StackWeights

Net = TypeVar("Net", bound=nn.Module)
SelfEnsemble = TypeVar("SelfEnsemble", bound="Ensemble")


def _is_amd() -> bool:
    """Whether the processor is one of AMD's: what Linux says, or else what Windows says."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return "AuthenticAMD" in platform.processor()
    with cpuinfo.open() as file:  # the first processor is enough: of hundreds it is a long file, and import waits
        return "AuthenticAMD" in file.read(200)


def _numpy_has_fast_kernels() -> bool:
    """Whether NumPy computes with OpenBLAS, and that has its kernels for AVX-512."""
    config: Any = np.show_config(mode="dicts")
    blas = config.get("Build Dependencies", {}).get("blas", {}).get("name", "")
    return "openblas" in blas and th.backends.cpu.get_cpu_capability() == "AVX512"


# Activations per layer and chunk of a pass through the stack: 2 MB, so that they stay in the processor's cache; a GPU
# needs much work at a time
_CHUNK_ELEMENTS = 2**19
_GPU_CHUNK_ELEMENTS = 2**25
# MKL, PyTorch's library for products, is slow on AMD's processors in cases that can be avoided (on Intel's the first
# way takes twice as long):
_ON_AMD = _is_amd()
# - products with up to so many rows: with the weights as the left operand they are up to three times as fast;
_FEW_ROWS = 4
# - one product of a shared input, of more components than this, and the weights of all critics: one product for each
#   critic is up to four times as fast;
_FEW_INPUTS = 64
# - weights that come from memory: in parts of so many bytes, each read once beforehand, so that it lies in the cache,
#   up to a third less time;
_READ_AHEAD = 2**20
# - the same where there is AVX-512: with up to 64 rows NumPy's OpenBLAS, in one thread, takes up to a quarter less
_NUMPY_IS_FASTER = _ON_AMD and _numpy_has_fast_kernels()
_LARGE_PAGE = 2**21
# Critics whose weight is at most this share of the sum of the weights are left out. With n of them left out, the sum S
# changes by at most n * 2^-32 * sum(weights) * max|Q|, and so a logit by that times the scale: n * 2^-32 * max|Q| /
# ent_coef in a full stack. For n = 256 this is the resolution of a float, 2^-24.
_NEGLIGIBLE_WEIGHT = 2.0**-32


class Dueling(nn.Module):
    """
    The additive critic of several groups of choices: ``Q(s,a) = V(s) + sum_g A_g(s,a_g)``, each ``A_g`` centred within
    its group. Without centring, choices that are seldom taken keep stale values while V grows.

    :param group_sizes: the number of choices of each group
    """

    def __init__(self, group_sizes: Sequence[int]):
        super().__init__()
        self.group_sizes = list(group_sizes)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: advantages and value, shape (..., sum(group_sizes) + 1)
        :return: the terms of the sum, V shared equally by the groups, shape (..., sum(group_sizes))
        """
        value = x[..., -1:] / len(self.group_sizes)
        advantages = x[..., :-1].split(self.group_sizes, dim=-1)
        return th.cat([value + group - group.mean(dim=-1, keepdim=True) for group in advantages], dim=-1)


def _named_layers(features_extractor: nn.Module, q_net: nn.Sequential) -> list[tuple[nn.Module, dict[str, str]]]:
    """Layer by layer, with the names of its parameters: what a batched pass needs to know."""
    if list(features_extractor.buffers()):
        raise ValueError(
            f"features_extractor_class={type(features_extractor).__name__} has buffers (as BatchNorm has), which a "
            "stack of critics cannot hold; accepted: extractors without, e.g. with LayerNorm or GroupNorm instead"
        )
    if len(list(features_extractor.parameters())) < len(
        list(features_extractor.named_parameters(remove_duplicate=False))
    ):
        raise ValueError(
            f"features_extractor_class={type(features_extractor).__name__} has a parameter under several names, which "
            "a stack of critics cannot hold; accepted: extractors in which each parameter has one name"
        )
    layers = {"features_extractor": features_extractor, **{f"q_net.{i}": layer for i, layer in enumerate(q_net)}}
    return [(layer, {leaf: f"{name}.{leaf}" for leaf, _ in layer.named_parameters()}) for name, layer in layers.items()]


def _make_mlp(
    n_inputs: int, n_outputs: int, net_arch: list[int], activation_fn: type[nn.Module], layer_norm: bool
) -> list[nn.Module]:
    """SB3's MLP; with ``layer_norm``, what goes into each activation is normalised."""
    post_linear_modules: list[type[nn.Module]] | None = [nn.LayerNorm] if layer_norm else None
    return create_mlp(n_inputs, n_outputs, net_arch, activation_fn, post_linear_modules=post_linear_modules)


class QNetwork(nn.Module):
    """
    One critic: features extractor, then an MLP with one output per choice. The last layer starts at zero, so the first
    policies are uniform.

    :param features_extractor: maps preprocessed observations to features of shape (batch, features_dim)
    :param group_sizes: the number of choices of each group
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation function
    :param dueling: whether the outputs are those of :class:`Dueling`
    :param layer_norm: whether hidden layers are normalised before their activations
    """

    def __init__(
        self,
        features_extractor: BaseFeaturesExtractor,
        group_sizes: Sequence[int],
        net_arch: list[int],
        activation_fn: type[nn.Module] = nn.ReLU,
        dueling: bool = False,
        layer_norm: bool = False,
    ):
        super().__init__()
        self.features_extractor = features_extractor
        self.n_choices = sum(group_sizes)
        n_outputs = self.n_choices + dueling
        mlp = _make_mlp(features_extractor.features_dim, n_outputs, net_arch, activation_fn, layer_norm)
        self.q_net = nn.Sequential(*mlp)
        for param in self.q_net[-1].parameters():
            nn.init.zeros_(param)
        if dueling:
            self.q_net.append(Dueling(group_sizes))
        self.output_index = len(self.q_net) - dueling  # of the last linear layer, in `layers`
        self.layers = _named_layers(features_extractor, self.q_net)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: preprocessed observations
        :return: Q-values, shape (batch, n_choices)
        """
        return self.q_net(self.features_extractor(obs))


class JointQNetwork(nn.Module):
    """
    One critic of whole actions: features extractor, then an MLP from features and action to one value.

    :param features_extractor: maps preprocessed observations to features of shape (batch, features_dim)
    :param n_inputs: number of components of an action
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation function
    :param layer_norm: whether hidden layers are normalised before their activations
    """

    def __init__(
        self,
        features_extractor: BaseFeaturesExtractor,
        n_inputs: int,
        net_arch: list[int],
        activation_fn: type[nn.Module] = nn.ReLU,
        layer_norm: bool = False,
    ):
        super().__init__()
        self.features_extractor = features_extractor
        mlp = _make_mlp(features_extractor.features_dim + n_inputs, 1, net_arch, activation_fn, layer_norm)
        self.q_net = nn.Sequential(*mlp)
        self.layers = _named_layers(features_extractor, self.q_net)


def _avoids_slow_products(x: th.Tensor) -> bool:
    return _ON_AMD and x.device.type == "cpu"


def _weights_first(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """As :func:`_linear`, with the weights on the left: output (N, n_outputs, batch)."""
    # Rows that lie apart, or a single one with strides that leave open how it lies, would make it slow
    x = x.flatten(1).unflatten(1, x.shape[1:])
    return th.baddbmm(bias.unsqueeze(2), weight, x.mT)


def _linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """
    N linear layers in one product.

    :param x: shape (N, batch, n_inputs)
    :param weight: shape (N, n_outputs, n_inputs)
    :param bias: shape (N, n_outputs)
    :return: shape (N, batch, n_outputs)
    """
    if _avoids_slow_products(x) and x.shape[1] <= _FEW_ROWS:
        return _weights_first(x, weight, bias).mT
    return th.baddbmm(bias.unsqueeze(1), x, weight.mT)


def _rows_at_once(x: th.Tensor, weight: th.Tensor) -> int:
    """
    How NumPy is to compute :func:`_linear`, without gradients, for weights that are not in the cache.

    :return: the number of rows for which a matrix product is fastest, 1 for dot products, 0 if PyTorch is faster
    """
    _, n_rows, n_inputs = x.shape
    if (
        # What compiles or exports a model cannot see what NumPy does
        th.jit.is_tracing()
        or th.compiler.is_compiling()
        or not _NUMPY_IS_FASTER
        or x.device.type != "cpu"
        or not x.dtype == weight.dtype == th.float32
        or th.get_num_threads() > 1
    ):
        return 0
    if n_rows < 4:  # dot products read weights at almost the speed of memory, if neither short nor long
        return int(128 <= n_inputs <= 320)
    if n_inputs < 64:
        return 0
    # OpenBLAS has kernels for products with up to 1,200 results
    return next((n for n in (4, 2) if n * weight.shape[1] <= 1200 and n_rows <= 16 * n), 0)


def _linear_by_numpy(x: th.Tensor, weight: th.Tensor, bias: th.Tensor, rows_at_once: int) -> th.Tensor:
    """As :func:`_linear_from_memory`."""
    weight, n_rows = weight.detach(), x.shape[1]
    if n_rows % rows_at_once != 0 or x.stride(-1) != 1:
        x = nn.functional.pad(x, (0, 0, 0, -n_rows % rows_at_once)).contiguous()
    outputs = x.new_empty(*x.shape[:2], weight.shape[1])
    if rows_at_once == 1:
        np.vecdot(weight.unsqueeze(1).numpy(), x.unsqueeze(2).numpy(), out=outputs.numpy())
    else:
        groups = (1, (-1, rows_at_once))
        rows, products = x.unflatten(*groups).numpy(), outputs.unflatten(*groups).numpy()
        matrices = weight.mT.unsqueeze(1).numpy()
        n = max(1, _READ_AHEAD // weight[0].nbytes)
        for start in range(0, len(weight), n):
            part = slice(start, start + n)
            weight[part].sum()  # reads it
            np.matmul(rows[part], matrices[part], out=products[part])
    return outputs[:, :n_rows].add_(bias.unsqueeze(1))


def _linear_from_memory(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """As :func:`_linear`, without gradients, for weights that are not in the cache."""
    rows_at_once = _rows_at_once(x, weight)
    if rows_at_once:
        return _linear_by_numpy(x, weight, bias, rows_at_once)
    n = max(1, _READ_AHEAD // weight[0].nbytes)
    if not _avoids_slow_products(x) or x.shape[1] <= _FEW_ROWS or len(weight) <= n:
        return _linear(x, weight, bias)
    outputs = x.new_empty(*x.shape[:2], weight.shape[1])
    for y, b, x_part, w in zip(outputs.split(n), bias.split(n), x.split(n), weight.split(n), strict=True):
        w.sum()  # reads it
        th.baddbmm(b.unsqueeze(1), x_part, w.mT, out=y)
    return outputs


def _weighted_linear(weights: th.Tensor, x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """The weighted sum of what :func:`_linear_from_memory` gives, shape (batch, n_outputs)."""
    rows_at_once = _rows_at_once(x, weight)
    if rows_at_once:
        return th.tensordot(weights, _linear_by_numpy(x, weight, bias, rows_at_once), dims=1)
    return th.tensordot(weights, _weights_first(x, weight, bias), dims=1).mT


class _BatchedMLP(th.autograd.Function):
    """
    N networks of linear layers, each as :func:`_linear`, with ReLUs between them. This is one node of autograd's graph
    instead of two per layer, without fresh memory for the ReLUs; and autograd's own gradients of the weights come out
    transposed, so that each step would copy them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: th.Tensor, *params: th.Tensor) -> tuple[th.Tensor, ...]:  # type: ignore[override]
        """Weights and biases in turn; returned are the outputs of all layers, since derivatives need them."""
        outputs: list[th.Tensor] = []
        for weight, bias in zip(params[::2], params[1::2], strict=True):
            outputs.append(_linear(outputs[-1].relu_() if outputs else x, weight, bias))
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[th.Tensor, ...], output: tuple[th.Tensor, ...]) -> None:
        x, *params = inputs
        ctx.save_for_backward(x, *output[:-1], *params[::2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor | None) -> tuple[th.Tensor | None, ...]:  # type: ignore[override]
        n = len(grads)
        inputs, weights = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        grads_x: list[th.Tensor | None] = [None, *grads]  # of the input of each layer, and of the last output
        grads_params: list[th.Tensor | None] = [None] * (2 * n)
        for i in reversed(range(n)):
            grad, x, weight = grads_x[i + 1], inputs[i], weights[i]
            if grad is None:
                continue
            if i < n - 1:
                grad = th.ops.aten.threshold_backward(grad, inputs[i + 1], 0)
            grads_params[2 * i] = th.bmm(grad.mT, x)
            grads_params[2 * i + 1] = grad.sum(dim=1)
            if i > 0 or ctx.needs_input_grad[0]:
                grad, own = th.bmm(grad, weight), grads_x[i]
                grads_x[i] = grad if own is None else grad + own
        return grads_x[0], *grads_params


# PyTorch asks for it in each call, and to find it anew takes as long as a small product
_BatchedMLP.forward.__signature__ = inspect.signature(_BatchedMLP.forward)  # type: ignore[attr-defined]


def _for_each(x: th.Tensor, n_copies: int) -> th.Tensor:
    """The input of each copy of a layer: of two dimensions it is shared by all."""
    return x if x.dim() == 3 else x.expand(n_copies, -1, -1)


def _batched_layer(
    layer: nn.Module, names: Mapping[str, str], all_params: Mapping[str, th.Tensor], x: Any, x_is_batched: bool
) -> th.Tensor:
    """
    Apply N copies of a layer, which differ in their parameters, in one pass.

    :param layer: gives the structure only
    :param names: names of the layer's parameters in ``all_params``
    :param all_params: parameters by name, each with a leading dimension N
    :param x: input, shared by all copies or with a leading dimension N
    :return: output with a leading dimension N; of a layer without parameters, which is the same for all copies and acts
        along the last dimension, with that of the input
    """
    if not names:
        in_place = isinstance(layer, nn.ReLU) and not th.is_grad_enabled()  # fresh memory costs more than the maximum
        return th.relu_(x) if in_place else layer(x)
    params = {leaf: all_params[name] for leaf, name in names.items()}
    # The frequent cases, without the cost of vmap's dispatch
    if isinstance(layer, nn.Linear):
        weight, bias = params["weight"], params["bias"]
        # More copies than rows: all in one product
        if not x_is_batched and len(weight) > len(x) and not (_avoids_slow_products(x) and x.shape[1] > _FEW_INPUTS):
            return th.addmm(bias.flatten(), x, weight.flatten(0, 1).mT).unflatten(1, bias.shape).transpose(0, 1)
        x = _for_each(x, len(weight))
        if th.is_autocast_enabled(x.device.type):
            return _linear(x, weight, bias)
        return _BatchedMLP.apply(x, weight, bias)[0] if th.is_grad_enabled() else _linear_from_memory(x, weight, bias)
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1 and len(params) == 2:
        one, zero = x.new_ones(layer.normalized_shape), x.new_zeros(layer.normalized_shape)
        x = th.layer_norm(x, layer.normalized_shape, one, zero, layer.eps)  # twice as fast as without the two
        return th.addcmul(params["bias"].unsqueeze(1), x, params["weight"].unsqueeze(1))
    in_dims = (0, 0 if x_is_batched else None)
    try:
        return vmap(lambda p, x: functional_call(layer, p, (x,)), in_dims, randomness="different")(params, x)
    except RuntimeError:  # recurrent layers, writing in place, branches on values: no vmap, so one after the other
        copies = [{leaf: param[i] for leaf, param in params.items()} for i in range(len(next(iter(params.values()))))]
        return th.stack([functional_call(layer, p, (x[i] if x_is_batched else x,)) for i, p in enumerate(copies)])


def _batched_layers(
    layers: Sequence[tuple[nn.Module, Mapping[str, str]]], all_params: Mapping[str, th.Tensor], x: th.Tensor
) -> th.Tensor:
    """As :func:`_batched_layer`, for one layer after the other; x of two dimensions is shared by all copies."""
    if th.is_grad_enabled() and not th.is_autocast_enabled(x.device.type):
        expected = zip(layers, itertools.cycle([nn.Linear, nn.ReLU]), strict=False)
        mlp = list(itertools.takewhile(lambda pair: isinstance(pair[0][0], pair[1]), expected))
        n = len(mlp) - (len(mlp) % 2 == 0)  # it ends with a linear layer
        if n > 1:
            params = [all_params[names[leaf]] for _, names in layers[:n:2] for leaf in ("weight", "bias")]
            x, layers = _BatchedMLP.apply(_for_each(x, len(params[0])), *params)[-1], layers[n:]
    for layer, names in layers:
        x = _batched_layer(layer, names, all_params, x, x_is_batched=x.dim() == 3)
    return x


def batched_forward(
    net: QNetwork, params: Mapping[str, th.Tensor], obs: PyTorchObs, weights: th.Tensor | None = None
) -> th.Tensor:
    """
    Q-values of N critics in one pass, or their weighted sum.

    :param net: gives the structure only
    :param params: parameters by name, each with a leading dimension N
    :param obs: preprocessed observations, shared by all critics
    :param weights: weights of the sum, shape (N,). From the output layer on a critic is linear, so the sum is taken
        there and what follows is done once.
    :return: shape (N, batch, n_choices), or (batch, n_choices) with weights
    """
    (extractor, names), *layers = net.layers
    x = _batched_layer(extractor, names, params, obs, x_is_batched=False)
    if weights is None:
        return _batched_layers(layers, params, x)
    n_hidden = net.output_index - 1
    x = _for_each(_batched_layers(layers[:n_hidden], params, x), len(weights))
    _, names = layers[n_hidden]
    x = _weighted_linear(weights, x, params[names["weight"]], params[names["bias"]])
    return _batched_layers(layers[n_hidden + 1 :], params, x)


class Ensemble(nn.Module, Generic[Net]):
    """
    Several networks of one architecture, evaluated in one batched pass.

    :param nets: the members; their parameters are copied
    """

    def __init__(self, nets: list[Net]):
        super().__init__()
        self.net = copy.deepcopy(nets[0])  # a features extractor may hold a module of the user's
        self.params = dict(self.net.named_parameters())
        for name, param in self.params.items():
            param.data = th.stack([net.get_parameter(name).data for net in nets])

    def frozen_copy(self: SelfEnsemble) -> SelfEnsemble:
        """A copy that is never trained."""
        return copy.deepcopy(self).requires_grad_(False).eval()


class CriticEnsemble(Ensemble[QNetwork]):
    """Several critics with one output per choice."""

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: preprocessed observations
        :return: Q-values of each member, shape (n_critics, batch, n_choices)
        """
        return batched_forward(self.net, self.params, obs)

    def q_values(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: preprocessed observations
        :return: mean of the members, shape (batch, n_choices)
        """
        return self(obs).mean(dim=0)


class JointCritics(Ensemble[JointQNetwork]):
    """Several critics of whole actions."""

    def forward(self, obs: PyTorchObs, actions: th.Tensor, rows: th.Tensor | None = None) -> th.Tensor:
        """
        :param obs: preprocessed observations
        :param actions: shape (n_actions, n_inputs)
        :param rows: the index of each action's observation, shape (n_actions,); by default one action for each
        :return: Q-values of each member, shape (n_critics, n_actions)
        """
        (extractor, names), *layers = self.net.layers
        features: Any = _batched_layer(extractor, names, self.params, obs, x_is_batched=False)
        if rows is not None:
            features = features.index_select(-2, rows)  # extracted once for all actions of an observation
        x = th.cat([features, actions.expand(*features.shape[:-1], -1)], dim=-1)
        return _batched_layers(layers, self.params, x).squeeze(-1)


def empty_block(like: th.Tensor, n: int) -> th.Tensor:
    """
    Memory for the parameters of n entries. A pass over few observations takes about as long as it takes to read the
    stack, and a processor reads large pages faster: so on Linux the kernel is asked for them.

    :param like: a tensor of the same type and device, shape (any, *shape)
    :param n: the number of entries
    :return: uninitialised, shape (n, *shape)
    """
    shape = (n, *like.shape[1:])
    n_bytes = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or n_bytes < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return th.frombuffer(memory, dtype=like.dtype).view(shape)


class FrozenCritics(nn.ModuleList):
    """
    The stack of frozen critics, oldest first: ``self[i]`` is the ensemble that one policy update pushed.

    Their weighted sum ``S(s) = sum_i w_i Q_i(s)`` times ``weights.scale`` are the logits of the policy.
    ``state_dict`` holds the critics and their weights; it loads into a stack of any size.

    :param template: an ensemble with the architecture of the entries
    :param logit_rule: a name or custom weights by age, see :func:`sb3_staq.mirror_descent.make_logit_rule`
    :param memory_size: the largest number of entries ("exact" has no limit)
    """

    def __init__(self, template: CriticEnsemble, logit_rule: LogitRule, memory_size: int):
        super().__init__()
        self.weights = StackWeights(logit_rule, memory_size)
        self._template = [template.frozen_copy()]  # in a list, so that it is not a submodule
        # The parameters of the entry with slot j are the views block[j]; the slots in use are always the first ones
        self._slots: list[int] = []
        self._blocks = {name: param.new_empty(0, *param.shape) for name, param in template.net.named_parameters()}
        head = [layer.weight for layer in template.net.q_net if isinstance(layer, nn.Linear)]
        self.n_choices = template.net.n_choices
        self.n_changes = 0  # pushes and loads: what has been computed with the stack before is void
        self._widest_layer = max(len(weight) * max(weight.shape[1:]) for weight in head)
        self._weigh()

    @th.no_grad()
    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        The weighted sum ``S`` of the stack, without gradients.

        :param obs: preprocessed observations
        :return: shape (batch, n_choices); zero for an empty stack
        """
        first = next(iter(obs.values())) if isinstance(obs, dict) else obs
        total = first.new_zeros(len(first), self.n_choices, dtype=th.float32)
        chunk_elements = _CHUNK_ELEMENTS if first.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
        chunk = max(1, chunk_elements // (self._widest_layer * len(first)))
        for start in range(0, len(self), chunk):
            part = slice(start, min(start + chunk, len(self)))
            if not any(self._slot_weights[part]):
                continue
            params = {name: block[part].flatten(0, 1) for name, block in self._blocks.items()}
            total += batched_forward(self._template[0].net, params, obs, self._weight_tensor[part].flatten())
        return total

    def push(
        self, critics: CriticEnsemble, kl_coef: float, ent_coef: float
    ) -> tuple[PolicyUpdate, CriticEnsemble | None]:
        """
        Freeze a copy of the critics on top of the stack; the oldest entry leaves a full one.

        :param critics: the current critics
        :param kl_coef: weight of the KL term
        :param ent_coef: weight of the entropy term
        :return: what this does to the weighted sum (nothing by way of deletion if the weight of the deleted entry was
            negligible), and the deleted entry (None if none was deleted)
        """
        self.n_changes += 1
        update = self.weights.push(kl_coef, ent_coef)
        deleted = None
        if update.deletes:
            entry, slot = self[0], self._slots.pop(0)
            deleted = copy.deepcopy(entry)  # the new entry takes over its memory
            del self[0]
        else:
            slot = len(self)
            self._reserve(slot + 1)
            entry = self._template[0].frozen_copy()
        for name, param in critics.net.named_parameters():
            self._blocks[name][slot].copy_(param.detach())
        self.append(entry)
        self._slots.append(slot)
        self._link(entry, slot)
        self._weigh()
        if abs(update.deleted_weight) <= _NEGLIGIBLE_WEIGHT * sum(map(abs, self.weights.values)):
            update = update._replace(deletes=False)  # a sum that follows the updates need not subtract it
        return update, deleted

    def __getitem__(self, index: Any) -> Any:  # a slice would otherwise make a new stack, without weights
        return list(self)[index] if isinstance(index, slice) else super().__getitem__(index)

    def _weigh(self) -> None:
        """Sort the weights as the blocks are, without the negligible ones, on the device of the blocks."""
        values = self.weights.values
        threshold = _NEGLIGIBLE_WEIGHT * sum(map(abs, values))
        by_slot = [value for _, value in sorted(zip(self._slots, values, strict=True))]
        self._slot_weights = [value if abs(value) > threshold else 0.0 for value in by_slot]
        block = next(iter(self._blocks.values()))
        n_critics = block.shape[1]
        weights = th.tensor(self._slot_weights, device=block.device)
        # The mean of an ensemble is a sum as well: one weight for each network, shape (len(self), n_critics)
        self._weight_tensor = (weights / n_critics).unsqueeze(1).repeat(1, n_critics)

    def _reserve(self, n_entries: int) -> None:
        """Grow the blocks by doubling, so that pushes cost amortised constant time, but not beyond the memory size."""
        capacity = len(next(iter(self._blocks.values())))
        if n_entries <= capacity:
            return
        new_capacity = max(n_entries, 2 * capacity)
        if self.weights.logit_rule != "exact":
            new_capacity = min(new_capacity, max(self.weights.memory_size, n_entries))
        for name, block in self._blocks.items():
            self._blocks[name] = empty_block(block, new_capacity)
            self._blocks[name][:capacity].copy_(block)
        self._link_all()

    def _link(self, entry: CriticEnsemble, slot: int) -> None:
        for name, param in entry.net.named_parameters():
            param.data = self._blocks[name][slot]

    def _link_all(self) -> None:
        for i, slot in enumerate(self._slots):
            self._link(self[i], slot)

    def _resize(self, slots: list[int]) -> None:
        """Make the stack hold entries of arbitrary values in these slots, to be loaded into."""
        n_entries = len(slots)
        if self.weights.logit_rule != "exact" and n_entries > self.weights.memory_size:
            raise ValueError(
                f"the saved stack has {n_entries} frozen critics but memory_size={self.weights.memory_size}; "
                f"load it with memory_size >= {n_entries}"
            )
        del self[:]
        self._slots = slots
        self.extend(self._template[0].frozen_copy() for _ in self._slots)
        self._reserve(n_entries)
        self._link_all()

    # Saving, loading, copying and moving: the blocks stay the one copy of the parameters

    def get_extra_state(self) -> dict[str, Any]:
        # The slots fix the order of the float sum: with them, loaded logits are bitwise equal
        return {"slots": list(self._slots), **self.weights.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.weights.load_state_dict(state)
        self._weigh()

    def gather(self) -> None:
        """Take over parameters that others than this class have put in place of the entries' own."""
        for i, slot in enumerate(self._slots):
            for name, param in self[i].net.named_parameters():
                self._blocks[name][slot].copy_(param.data)
        self._link_all()
        self.n_changes += 1

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> Any:
        """As of any module, but with copies: saving a view would save the whole block, unused slots included."""
        state = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars, **kwargs)
        for key, value in state.items():
            if key.startswith(prefix) and isinstance(value, th.Tensor) and not keep_vars:
                state[key] = value.clone()
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        extra_state = state_dict.get(f"{prefix}_extra_state")
        if extra_state is not None:
            self._resize(list(extra_state["slots"]))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.n_changes += 1

    def _apply(self, fn: Callable[[th.Tensor], th.Tensor], recurse: bool = True) -> "FrozenCritics":
        super()._apply(fn, recurse)
        self._template[0]._apply(fn)
        self._blocks = {name: fn(block) for name, block in self._blocks.items()}
        self._weight_tensor = fn(self._weight_tensor)
        self._link_all()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_modules": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.extend(self._template[0].frozen_copy() for _ in self._slots)
        self._link_all()
