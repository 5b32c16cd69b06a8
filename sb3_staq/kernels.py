"""The only file with code for particular processors: two functions, each next to its plain reference.

A fast path is admitted if it matches the reference to 2e-6 and makes a shipped configuration at least 10% faster end to
end. ``SB3_STAQ_PLAIN_KERNELS=1`` in the environment turns all of them off.

CPU time without a fast path divided by that with it, for an environment step with all that is due (``python -m
benchmarks.speed --variants``; AMD EPYC, one thread of a busy machine, one turn each, two for CartPole):

==================  =================  ====================  =====================  ====================
without             CartPole defaults  CartPole, M=300       the same, 8 envs       Box defaults, 8 envs
==================  =================  ====================  =====================  ====================
large pages         1.06               1.04                  0.96                   0.97
read-ahead          1.00               1.08                  1.18                   1.03
few rows            1.22               1.36                  1.01                   1.01
all                 1.58               1.89                  1.14                   0.90
==================  =================  ====================  =====================  ====================

With M=300, an action takes 1.20 times as long without large pages (median of 12 turns within one process), and the
whole step 1.1 times. The table is of a version with one more fast path, for the weighted sum, which was worth 1.04 at
most. The row of the read-ahead compares with parts of one network each. Without any fast
path, so also without the read-ahead, the same step takes 1.14 times as long.
"""

import contextlib
import functools
import math
import mmap
import os
import platform
from pathlib import Path

import torch as th
from torch.nn.functional import linear

# Up to this many rows, MKL, PyTorch's library for matrix products on CPUs, is up to three times slower on AMD's
# processors unless the weights are the left operand
FEW_ROWS = 4
# On AMD's processors, weights that come from memory are used in parts of this many bytes, each read once beforehand
READ_AHEAD_BYTES = 2**20
# Linux provides pages of this size on request, and processors read them faster
LARGE_PAGE_BYTES = 2**21


@functools.cache
def _special() -> bool:
    return os.environ.get("SB3_STAQ_PLAIN_KERNELS", "0") in ("", "0")


@functools.cache
def _on_amd() -> bool:
    """Return whether this is an AMD processor, according to Linux or else the platform."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return "AuthenticAMD" in platform.processor()
    with cpuinfo.open() as file:
        return "AuthenticAMD" in file.read(200)


def exporting() -> bool:
    """Return whether the model is being traced, compiled or exported: nothing may depend on the batch size then."""
    return th.jit.is_tracing() or th.compiler.is_compiling()  # the second also during th.export


def plain_batched_linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """Reference of :func:`batched_linear`."""
    return th.baddbmm(bias.unsqueeze(1), x.expand(len(weight), -1, -1), weight.mT)


def batched_linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """
    Apply N linear layers at once, in a way that depends on the batch size: exported models take the reference.

    :param x: input, shape (N, batch, n_inputs), or (batch, n_inputs) if all layers share it
    :param weight: shape (N, n_outputs, n_inputs)
    :param bias: shape (N, n_outputs)
    :return: shape (N, batch, n_outputs)
    """
    if x.device.type != "cpu" or not _special() or not _on_amd():
        return plain_batched_linear(x, weight, bias)
    if x.shape[-2] <= FEW_ROWS:
        if x.dim() == 2:  # one wide layer
            return linear(x, weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape).transpose(0, 1)
        # Rows that are not contiguous, or a single row with ambiguous strides, would make it slow
        return th.baddbmm(bias.unsqueeze(2), weight, x.flatten(1).unflatten(1, x.shape[1:]).mT).mT
    n = max(1, READ_AHEAD_BYTES // (math.prod(weight.shape[1:]) * weight.element_size()))
    if th.is_grad_enabled() or len(weight) <= n:
        return plain_batched_linear(x, weight, bias)
    x = x.expand(len(weight), -1, -1)
    outputs = x.new_empty(*x.shape[:2], weight.shape[1])
    for out, b, part, w in zip(outputs.split(n), bias.split(n), x.split(n), weight.split(n), strict=True):
        w.sum()  # reads it ahead
        th.baddbmm(b.unsqueeze(1), part, w.mT, out=out)
    return outputs


def plain_allocate(like: th.Tensor, n: int) -> th.Tensor:
    """Reference of :func:`allocate`."""
    return like.new_empty(n, *like.shape[1:])


def allocate(like: th.Tensor, n: int) -> th.Tensor:
    """
    Allocate memory for the parameters of n critics, since acting takes about as long as reading them.

    :param like: a tensor of the same type and device, shape ``(any, *shape)``
    :param n: number of critics
    :return: an uninitialised tensor, shape ``(n, *shape)``
    """
    shape = (n, *like.shape[1:])
    n_bytes = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or n_bytes < LARGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE") or not _special():
        return plain_allocate(like, n)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return th.frombuffer(memory, dtype=like.dtype).view(shape)
