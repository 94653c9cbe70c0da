"""``self_attention`` keeps its promises: that of a row is the attention of the row alone, however the rows lie."""

import contextlib
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastflow import backend as _backend
from fastflow.ops import attention_ref, self_attention
from fastflow.ops.attention import DTYPES, restored_self_attention, rotate_first_head
from fastflow.testing import poison
from fastflow.testing.tolerances import assert_parity

HEADS, WIDTH = 2, 16
# Frames of each row, from none to several tiles.
LAYOUTS = {
    "one row": [19],
    "ragged": [11, 19, 1, 2, 17],
    "empty rows": [0, 5, 0, 1],
    "tiles": [130, 1, 97, 48],
}
packed_or_padded = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


@pytest.fixture
def backend(backend):
    """The backends that attention knows."""
    if backend not in ("reference", *DTYPES):
        pytest.skip(f"not run: attention has no kernel for backend {backend}")
    return backend


def angles(frames, width=WIDTH, dtype=torch.float32):
    """A rotary table; its angles are larger than those of a flow, whose last channels hardly turn."""
    angle = torch.arange(frames, dtype=dtype)[:, None] * torch.linspace(0.1, 2.0, width // 2, dtype=dtype)
    return torch.stack([angle.cos(), angle.sin()])


def make(sizes, packed, dtype=torch.float32, device="cpu", chunk_size=0, turned=False, heads=HEADS, width=WIDTH):
    """qkv, the gradient of the output, and the other arguments."""
    batch, frames = (1, sum(sizes)) if packed else (len(sizes), max(sizes) + 2)
    qkv = torch.randn(batch, frames, 3, heads, width).to(device, dtype)
    grad = torch.randn(batch, frames, heads, width).to(device, dtype)
    rule = {"sizes": sizes} if packed else {"lengths": torch.tensor(sizes, device=device)}
    if turned:
        rule["rotary"] = angles(max(sizes) + 3, width).to(device)
    return qkv, grad, {**rule, "chunk_size": chunk_size}


def run(qkv, grad, rule, function=self_attention, **kwargs):
    """The output and the gradient of qkv."""
    leaf = qkv.detach().requires_grad_()
    out = function(leaf, **rule, **kwargs)
    return {"out": out.detach(), "grad_qkv": torch.autograd.grad(out, leaf, grad)[0]}


def rows_alone(qkv, *, chunk_size, sizes=None, lengths=None, rotary=None):
    """:func:`attention_ref` of every row by itself."""
    if sizes is not None:
        rows = qkv.split(sizes, 1)
    else:
        rows = [row[:, :n] for row, n in zip(qkv.split(1), lengths.tolist(), strict=True)]
    outs = []
    for row in rows:
        if rotary is not None:
            row = rotate_first_head(row, *rotary[:, : row.shape[1]].to(row.device))
        out = attention_ref(*(x.transpose(1, 2) for x in row.unbind(2)), chunk_size=chunk_size).transpose(1, 2)
        if sizes is None:
            out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, qkv.shape[1] - out.shape[1]))
        outs.append(out)
    return torch.cat(outs, 1 if sizes is not None else 0)


def assert_right(qkv, grad, rule, backend, case=""):
    got = run(qkv, grad, rule, backend=backend)
    eager = run(qkv, grad, rule, rows_alone)
    truth = run(qkv.double(), grad.double(), rule, rows_alone)
    assert_parity(got, eager, truth, case=f"self_attention {backend} {case}", sums=(qkv.shape[-1], qkv.shape[1]))


def assert_same(got, want):
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("turned", [False, True], ids=["plain", "turned"])
@pytest.mark.parametrize("chunk_size", [0, 7])
@packed_or_padded
@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)
def test_matches_the_reference_of_each_row(sizes, packed, chunk_size, turned, backend, device):
    if backend == "triton" and max(sizes) > 64 and device.type == "cpu":
        pytest.skip("not run: many tiles on triton: this machine has no GPU")
    case = make(sizes, packed, device=device, chunk_size=chunk_size, turned=turned)
    assert_right(*case, backend, f"{sizes}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@packed_or_padded
def test_matches_the_reference_in_every_dtype(dtype, packed, backend, device):
    qkv, grad, rule = make([11, 3, 19], packed, dtype, device, chunk_size=5, turned=True)
    if dtype not in DTYPES.get(backend, (dtype,)):
        with pytest.raises(RuntimeError, match="does not support"):
            self_attention(qkv, **rule, backend=backend)
        return
    assert_right(qkv, grad, rule, backend, str(dtype))


@pytest.mark.parametrize(("frames", "width"), [(2, 256), (15, 80), (63, 24), (65, 64), (129, 8)])
@packed_or_padded
def test_odd_sizes(frames, width, packed, backend, device):
    if backend == "triton" and frames > 64 and device.type == "cpu":
        pytest.skip("not run: many tiles on triton: this machine has no GPU")
    case = make([frames - frames // 3, frames], packed, device=device, heads=1, width=width, turned=True)
    assert_right(*case, backend, f"{frames} x {width}")


@pytest.mark.skipif(_backend.extension is None, reason=f"not run: {_backend.extension_error}")
@packed_or_padded
def test_every_capability_agrees_with_the_reference(packed):
    capabilities = _backend.extension.cpu_capabilities()
    case = make(LAYOUTS["tiles"], packed, chunk_size=50, turned=True)
    try:
        for capability in capabilities:
            _backend.extension.set_cpu_capability(capability)
            assert_right(*case, "cpu", capability)
    finally:
        _backend.extension.set_cpu_capability(capabilities[-1])


# ------------------------------------------------------------------------------------------------ memory
@packed_or_padded
def test_only_the_rows_are_read(packed, kernel_backend, device):
    """Padding, and what lies around qkv and the gradient, is NaN."""
    if kernel_backend not in DTYPES:
        pytest.skip(f"not run: attention has no kernel for backend {kernel_backend}")
    qkv, grad, rule = make([7, 0, 12, 1], packed, device=device, turned=True)
    want = run(qkv, grad, rule, backend=kernel_backend)
    if not packed:
        padding = (torch.arange(qkv.shape[1], device=device) >= rule["lengths"][:, None])[..., None, None]
        qkv, grad = qkv.masked_fill(padding[..., None], math.nan), grad.masked_fill(padding, math.nan)
        assert not want["out"].masked_select(padding).any()
        assert not want["grad_qkv"].masked_select(padding[..., None]).any()
    assert_same(run(poison.embedded(qkv), poison.embedded(grad), rule, backend=kernel_backend), want)


@packed_or_padded
def test_writes_all_of_its_outputs_and_nothing_else(packed, backend, device):
    case = make(LAYOUTS["ragged"], packed, device=device, turned=True)
    want = run(*case, backend=backend)
    guard = poison.guarded_allocations() if backend == "triton" else contextlib.nullcontext()
    with poison.nan_memory(), guard:
        assert_same(run(*case, backend=backend), want)


@pytest.mark.skipif(_backend.extension is None, reason=f"not run: {_backend.extension_error}")
@pytest.mark.parametrize("neighbour", [1, 3])
def test_a_packed_row_leaves_its_neighbours_alone(neighbour):
    """The result of every other row is the same to the bit, whatever one row holds."""
    sizes = [5, 9, 1, 30, 2]
    qkv, grad, rule = make(sizes, True)
    want = run(qkv, grad, rule, backend="cpu")
    rows = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes)) == neighbour
    qkv[:, rows] = math.nan
    got = run(qkv, grad, rule, backend="cpu")
    for name in want:
        assert torch.equal(got[name][:, ~rows], want[name][:, ~rows]), name
        assert got[name][:, rows].isnan().any(), name


@packed_or_padded
def test_results_are_one_piece_and_inputs_stay(packed, kernel_backend, device):
    if kernel_backend not in DTYPES:
        pytest.skip(f"not run: attention has no kernel for backend {kernel_backend}")
    qkv, grad, rule = make([4, 6], packed, device=device, turned=True)
    before = qkv.clone()
    got = run(qkv, grad, rule, backend=kernel_backend)
    assert torch.equal(qkv, before)
    assert got["grad_qkv"].is_contiguous()
    assert got["out"].is_contiguous()


def test_keeps_qkv_the_output_and_the_sums_alone():
    if _backend.extension is None:
        pytest.skip(f"not run: {_backend.extension_error}")
    qkv, _, rule = make([9, 5], True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        self_attention(qkv.requires_grad_(), **rule, backend="cpu")
    assert sorted(sizes) == sorted([14 * 3 * HEADS * WIDTH, 14 * HEADS * WIDTH, 2 * HEADS * 9])


@packed_or_padded
def test_the_number_of_threads_changes_no_bit(packed):
    """Also: a long row that is done after the short one behind it leaves that alone."""
    threads, results = torch.get_num_threads(), []
    case = make([200, 1, 210, 1], packed, heads=1, turned=True)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(*case))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same(result, results[0])


# ------------------------------------------------------------------------------------------------ autograd and torch
@packed_or_padded
def test_formed_again_is_the_same_to_the_bit(packed, backend, device):
    qkv, grad, rule = make([7, 12], packed, device=device, turned=True, chunk_size=4)
    weight = torch.randn(WIDTH, WIDTH, device=device)
    results = []
    for restored in (False, True):
        leaves = [x.detach().requires_grad_() for x in (qkv, weight)]
        if restored:
            out = restored_self_attention(torch.matmul, *leaves, **rule, backend=backend)
        else:
            out = self_attention(torch.matmul(*leaves), **rule, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    with torch.no_grad():
        assert torch.equal(restored_self_attention(torch.matmul, qkv, weight, **rule, backend=backend), results[0][0])


@packed_or_padded
def test_gradcheck(packed, backend, device):
    if torch.float64 not in DTYPES.get(backend, (torch.float64,)):
        pytest.skip(f"backend {backend} has no float64")
    qkv, _, rule = make([3, 1, 4], packed, torch.float64, device, chunk_size=2, turned=True, heads=2, width=8)
    assert torch.autograd.gradcheck(lambda x: self_attention(x, **rule, backend=backend), qkv.requires_grad_())


@packed_or_padded
def test_repeats_are_bitwise_equal(packed, backend, device):
    case = make(LAYOUTS["ragged"], packed, device=device, turned=True)
    first = run(*case, backend=backend)
    for _ in range(49 if backend == "cpu" or device.type == "cuda" else 2):
        assert_same(run(*case, backend=backend), first)


@packed_or_padded
def test_opcheck(packed):
    if _backend.extension is None:
        pytest.skip(f"not run: {_backend.extension_error}")
    qkv, grad, rule = make([3, 5], packed, turned=True)
    numbers = rule.get("lengths"), rule.get("sizes"), 2, 0.25, rule["rotary"]
    ops = torch.ops.fastflow
    out, lse = ops.self_attention(qkv, *numbers)
    torch.library.opcheck(ops.self_attention, (qkv, *numbers))
    torch.library.opcheck(ops.self_attention_backward, (grad, out, lse, qkv, *numbers))


@packed_or_padded
def test_compiles_in_one_graph_and_not_again_for_new_sizes(packed, backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, rule: self_attention(x, **rule, backend=backend), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    for n, sizes in enumerate([[5, 3], [9, 4], [13, 6]]):
        qkv, grad, rule = make(sizes, packed, device=device, turned=True, chunk_size=4)
        with torch._dynamo.config.patch(error_on_recompile=n > 1 and not packed):
            got = run(qkv, grad, {"rule": rule}, compiled)
        want = run(qkv, grad, rule, backend=backend)
        for name in want:
            torch.testing.assert_close(got[name], want[name])
    torch._dynamo.reset()


@packed_or_padded
def test_activation_checkpointing(packed, backend, device):
    qkv, grad, rule = make([7, 3], packed, device=device)
    want = run(qkv, grad, rule, backend=backend)
    got = run(qkv, grad, rule, lambda x, **r: checkpoint(lambda y: self_attention(y, **r), x, use_reentrant=False),
              backend=backend)  # fmt: skip
    assert_same(got, want)


# ------------------------------------------------------------------------------------------------ bad input
X = torch.zeros(1, 10, 3, 2, 16)
TWO = torch.zeros(2, 10, 3, 2, 16)
BAD_INPUT = {
    "four dimensions": (X[0], {}, r"qkv must have shape \[B, T, 3, H, D\].*got \[10, 3, 2, 16\]"),
    "two parts": (X[:, :, :2], {}, "qkv must have shape"),
    "integers": (X.long(), {}, "qkv must have .* a floating dtype, got .* torch.int64"),
    "head dim 12": (X[..., :12], {}, "the head dimension must be a multiple of 8 up to 256, got 12"),
    "lengths of other rows": (X, {"lengths": torch.zeros(3, dtype=torch.int64)}, r"shape \[1\], got \[3\]"),
    "float lengths": (X, {"lengths": torch.zeros(1)}, "lengths must be int32 or int64 .* torch.float32"),
    "lengths elsewhere": (X, {"lengths": torch.zeros(1, dtype=torch.int64, device="meta")}, "lengths is on"),
    "negative chunk": (X, {"chunk_size": -1}, "chunk_size must be >= 0, .* got -1"),
    "sizes of two rows": (TWO, {"sizes": [5, 5]}, "sizes need B == 1 and no lengths, got B == 2 and none"),
    "sizes and lengths": (X, {"sizes": [10], "lengths": torch.ones(1, dtype=torch.int64)}, "got B == 1 and some"),
    "another sum": (X, {"sizes": [5, 4]}, r"sizes must be numbers >= 0 with the sum 10, got \[5, 4\]"),
    "negative size": (X, {"sizes": [11, -1]}, r"sizes must be .* got \[11, -1\]"),
    "no sizes": (X[:, :0], {"sizes": []}, r"sizes must be .* got \[\]"),
    "short table": (X, {"rotary": torch.zeros(2, 9, 8)}, r"rotary must have shape \[2, frames, 8\] with at least 10"),
    "table of another width": (X, {"rotary": torch.zeros(2, 10, 16)}, r"got \[2, 10, 16\]"),
    "integer table": (X, {"rotary": torch.zeros(2, 10, 8).long()}, "rotary is torch.int64"),
    "table elsewhere": (X, {"rotary": torch.zeros(2, 10, 8, device="meta")}, "rotary is torch.float32 on meta"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case):
    qkv, rule, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        self_attention(qkv, **rule)


BAD_ARGUMENTS = {
    "qkv must have shape": {"qkv": X[0]},
    "multiple of 8": {"qkv": X[..., :7]},
    "float32, float64": {"qkv": X.long()},
    "lengths must have shape": {"lengths": torch.ones(3, dtype=torch.int64)},
    "chunk_size must be": {"chunk_size": -1},
    "sizes need qkv of B == 1": {"qkv": TWO, "sizes": [10]},
    "sizes must lie in": {"sizes": [12, -2]},
    "sizes must add up": {"sizes": [4, 5]},
    "rotary must have shape": {"rotary": torch.zeros(2, 9, 8)},
    "rotary must have the dtype": {"rotary": torch.zeros(2, 10, 8).double()},
    "must be contiguous": {"rotary": torch.zeros(2, 8, 10).mT},
}


@pytest.mark.skipif(_backend.extension is None, reason=f"not run: {_backend.extension_error}")
@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_registered_op_checks_its_arguments(message):
    values = {"qkv": X, "lengths": None, "sizes": None, "chunk_size": 0, "scale": 0.25, "rotary": None}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastflow.self_attention(*{**values, **BAD_ARGUMENTS[message]}.values())


@pytest.mark.skipif(_backend.extension is None, reason=f"not run: {_backend.extension_error}")
def test_registered_backward_checks_its_tensors():
    rule = (X, None, [4, 6], 0, 0.25, None)
    out, lse = torch.ops.fastflow.self_attention(*rule)
    assert lse.shape == (2, 2, 6)
    for name, bad in {
        "grad": (out[:, 1:], out, lse),
        "out": (out, out.double(), lse),
        "lse": (out, out, lse[..., :4]),
    }.items():
        with pytest.raises(RuntimeError, match=f"{name} must have"):
            torch.ops.fastflow.self_attention_backward(*bad, *rule)
