"""The special ways of the kernels against their plain references, and the switch that turns them off."""

import mmap

import pytest
import torch as th
from helpers import relative_error

from benchmarks.speed import VARIANTS
from sb3_staq import kernels

SHAPES = [  # networks, batch, inputs, outputs
    (1, 1, 1, 1),
    (1, 3, 4, 256),
    (2, 1, 256, 256),
    (3, 4, 17, 5),
    (5, 5, 4, 64),
    (7, 33, 64, 3),
    (9, 256, 48, 48),
    (100, 1, 256, 256),
    (120, 2, 64, 30),
]


@pytest.fixture(params=["AMD", "another maker"])
def processor(request, monkeypatch):
    """As on a processor of this maker."""
    monkeypatch.setattr(kernels, "_special", lambda: True)
    monkeypatch.setattr(kernels, "_on_amd", lambda: request.param == "AMD")


def operands(n, batch, n_inputs, n_outputs, shared):
    generator = th.Generator().manual_seed(n + batch)
    shapes = [(batch, n_inputs) if shared else (n, batch, n_inputs), (n, n_outputs, n_inputs), (n, n_outputs)]
    return [th.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("read_ahead", [1, 3 * 48 * 48 * 4, 2**20])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_special_ways_equal_the_references(shape, shared, read_ahead, processor, monkeypatch):
    """And both equal the sums in double precision; with and without gradients."""
    monkeypatch.setattr(kernels, "READ_AHEAD_BYTES", read_ahead)
    x, weight, bias = operands(*shape, shared)  # type: ignore[call-arg]
    each = x.double().expand(len(weight), -1, -1)
    exact = th.einsum("nbi,noi->nbo", each, weight.double()) + bias.double().unsqueeze(1)
    plain = kernels.plain_batched_linear(x, weight, bias)
    for grad in (False, True):
        with th.set_grad_enabled(grad):
            outputs = kernels.batched_linear(x, weight, bias)
        assert outputs.shape == exact.shape
        for actual, expected in ((outputs, plain), (outputs, exact), (plain, exact)):
            assert relative_error(actual, expected) < 2e-6


@pytest.mark.parametrize(
    ("variant", "reference"),
    [
        ("no read-ahead", "plain_batched_linear"),
        ("no few rows", "plain_batched_linear"),
        ("no large pages", "plain_allocate"),
    ],
)
def test_variants_of_the_speed_benchmark_take_the_references(variant, reference, monkeypatch):
    """Each turns off what it says."""
    calls = []
    monkeypatch.setattr(kernels, "_special", lambda: True)
    monkeypatch.setattr(kernels, "_on_amd", lambda: True)
    monkeypatch.setattr(kernels, reference, lambda *args: calls.append(args))
    # Two rows of few networks; or more bytes than are read ahead at once, and than a large page has
    shape = (3, 2, 256, 256) if variant == "no few rows" else (20, 8, 256, 256)
    x, weight, bias = operands(*shape, False)

    def work():
        kernels.batched_linear(x, weight, bias)
        kernels.allocate(weight, len(weight))

    with th.no_grad():
        work()
        assert not calls
        for name, value in VARIANTS[variant].items():
            monkeypatch.setattr(kernels, name, value)
        work()
    assert len(calls) == 1


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_gradients_of_the_special_ways(batch, shared, processor):
    """Equal those of the references, by every operand."""
    values = operands(3, batch, 6, 5, shared)

    def gradients(linear):
        leaves = [value.clone().requires_grad_() for value in values]
        return th.autograd.grad(linear(*leaves).sin().sum(), leaves)

    special, plain = gradients(kernels.batched_linear), gradients(kernels.plain_batched_linear)
    for actual, expected in zip(special, plain, strict=True):
        assert relative_error(actual, expected) < 2e-6


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded row", "transposed row"])
def test_inputs_in_any_layout(layout, processor):
    """However the rows lie in memory."""
    weight, bias = operands(3, 2, 6, 5, True)[1:]
    base = th.randn(6, 12, generator=th.Generator().manual_seed(0))
    x = {
        "transposed": base[:, :2].T,
        "strided": base[::3, ::2],
        "expanded row": base[:1, :6].expand(4, -1),
        "transposed row": base[:, :1].T,
    }[layout]
    assert relative_error(kernels.batched_linear(x, weight, bias), kernels.plain_batched_linear(x, weight, bias)) < 2e-6


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("dtype", [th.float32, th.float64, th.int64])
@pytest.mark.parametrize("n", [0, 1, 3, 100])
def test_allocate(n, dtype, refused, monkeypatch):
    """Memory of the right shape and type that can be written and is not shared; with and without large pages."""
    monkeypatch.setattr(kernels, "_special", lambda: True)
    monkeypatch.setattr(kernels, "LARGE_PAGE_BYTES", 200)
    if refused and hasattr(mmap, "MADV_HUGEPAGE"):

        class Memory(mmap.mmap):
            def madvise(self, *args):
                raise OSError("invalid argument")

        monkeypatch.setattr(mmap, "mmap", Memory)
    like = th.zeros(2, 5, 3, dtype=dtype)
    blocks = [kernels.allocate(like, n) for _ in range(2)]
    plain = kernels.plain_allocate(like, n)
    for i, block in enumerate(blocks):
        assert (
            (block.shape, block.dtype, block.device)
            == (plain.shape, plain.dtype, plain.device)
            == (
                (n, 5, 3),
                dtype,
                like.device,
            )
        )
        assert block.is_contiguous() and not block.requires_grad
        block.fill_(i)
    assert (blocks[0] == 0).all() and (blocks[1] == 1).all()


@pytest.mark.parametrize("shape", [(0,), (0, 3), ()], ids=str)
def test_allocate_nothing_and_scalars(shape, monkeypatch):
    """Parameters without elements, and single numbers."""
    monkeypatch.setattr(kernels, "_special", lambda: True)
    monkeypatch.setattr(kernels, "LARGE_PAGE_BYTES", 1)
    assert kernels.allocate(th.zeros(2, *shape), 7).shape == (7, *shape)


def test_without_a_way_to_ask_for_large_pages(monkeypatch):
    """As on Windows and macOS."""
    monkeypatch.setattr(kernels, "_special", lambda: True)
    monkeypatch.setattr(kernels, "LARGE_PAGE_BYTES", 1)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.delattr(mmap, "mmap")
    assert kernels.allocate(th.zeros(2, 3), 7).shape == (7, 3)


@pytest.mark.parametrize(("value", "plain"), [("1", True), ("yes", True), ("0", False), ("", False), (None, False)])
def test_switch(value, plain, monkeypatch):
    """SB3_STAQ_PLAIN_KERNELS turns all special ways off, as is seen by how results lie in memory."""
    if value is None:
        monkeypatch.delenv("SB3_STAQ_PLAIN_KERNELS", raising=False)
    else:
        monkeypatch.setenv("SB3_STAQ_PLAIN_KERNELS", value)
    monkeypatch.setattr(kernels, "_on_amd", lambda: True)
    monkeypatch.setattr(kernels, "LARGE_PAGE_BYTES", 1)
    x, weight, bias = operands(5, 3, 17, 9, True)
    kernels._special.cache_clear()
    try:
        outputs = kernels.batched_linear(x, weight, bias)
        block = kernels.allocate(weight, 5)
    finally:
        kernels._special.cache_clear()
    assert outputs.is_contiguous() == plain
    assert block.untyped_storage().resizable() == (plain or not hasattr(mmap, "MADV_HUGEPAGE"))


@pytest.mark.parametrize(
    ("cpuinfo", "windows", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\n", "", True),
        ("vendor_id\t: GenuineIntel\n", "", False),
        (None, "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", True),
        (None, "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", False),
        (None, "arm", False),
    ],
)
def test_maker_of_the_processor(cpuinfo, windows, expected, tmp_path, monkeypatch):
    """What Linux and Windows say of themselves."""
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    monkeypatch.setattr(kernels, "Path", {"/proc/cpuinfo": path}.__getitem__)
    monkeypatch.setattr("platform.processor", lambda: windows)
    kernels._on_amd.cache_clear()
    try:
        assert kernels._on_amd() is expected
    finally:
        kernels._on_amd.cache_clear()
