"""``interpolate`` keeps its promises on every backend."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastflow import use_backend
from fastflow.ops import interpolate, interpolate_ref
from fastflow.testing import cases, poison
from fastflow.testing.tolerances import assert_parity

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Segments of each row: what lies in the second row's list is cut, empty, negative or more than there is.
PATTERNS = {
    "whole row": [(37, 64)],
    "prompt head mid tail": list(cases.inference_segments(9, 47)),
    "longer and shorter": [(17, 5), (3, 29)],
    "padded": [(12, 20), (1, 1), (5, 9)],
    "per row": torch.tensor([[[14, 20], [9, 12]], [[11, 19], [0, 0]]]),
    "per row, four segments": torch.tensor(
        [[[5, 9], [2, 3], [12, 17], [2, 3]], [[1, 7], [4, 4], [9, 3], [20, 2]], [[0, 0], [1, 1], [0, 0], [25, 31]]]
    ),
    "per row, beyond the tensor": torch.tensor([[[20, 15], [30, 25]], [[-3, 5], [20, 40]], [[9, -1], [40, 10]]]),
    "per row, beyond 32 bits": torch.tensor([[[9, 5], [2**32 + 3, 2**32 + 7]], [[-(2**40), -(2**40)], [2**40, 30]]]),
}


def make(pattern, dtype=torch.float32, device="cpu", channels=7):
    """Input, segments and output frames of a pattern; padded patterns leave frames on both sides unused."""
    segments = PATTERNS.get(pattern, pattern)
    if isinstance(segments, torch.Tensor):
        x = torch.randn(len(segments), 26, channels)
        return x.to(device, dtype), segments.to(device), 32
    extra = 3 if pattern == "padded" else 0
    x = torch.randn(2, sum(s for s, _ in segments) + extra, channels)
    return x.to(device, dtype), segments, sum(d for _, d in segments) + extra


def run(x, segments, frames, grad, *, function=interpolate, channels_first=False, **kwargs):
    """Output and input gradient for the output gradient ``grad`` [B, C, frames] or [B, frames, C]."""
    x = x.detach().requires_grad_()
    out = function(x, segments, frames, channels_first=channels_first, **kwargs)
    (grad_x,) = torch.autograd.grad(out, x, grad)
    return {"out": out.detach(), "grad_x": grad_x}


def row_weights(pairs, in_frames, frames):
    """The op on one row as a float64 matrix [frames, T], with positions that are exact fractions of integers."""
    matrix = torch.zeros(frames, in_frames, dtype=torch.float64)
    src_start = dst_start = 0
    for src_len, dst_len in pairs:
        src_len, dst_len = min(max(src_len, 0), in_frames - src_start), max(dst_len, 0)
        for j in range(min(dst_len, frames - dst_start) if src_len else 0):
            i0, rest = divmod(max((2 * j + 1) * src_len - dst_len, 0), 2 * dst_len)
            w = rest / (2 * dst_len)
            matrix[dst_start + j, src_start + i0] += 1 - w
            matrix[dst_start + j, src_start + min(i0 + 1, src_len - 1)] += w
        src_start += src_len
        dst_start += dst_len
    return matrix


def weights(x, segments, frames):
    """The op as float64 matrices [B, frames, T], or [1, frames, T] if the rows share their segments."""
    rows = segments.tolist() if isinstance(segments, torch.Tensor) else [segments]
    return torch.stack([row_weights(pairs, x.shape[1], frames) for pairs in rows]).to(x.device)


def truth(x, segments, frames, grad, channels_first=False):
    """What ``run`` should return, in float64."""
    matrix = weights(x, segments, frames)
    out = matrix @ x.double()
    grad = grad.double().transpose(1, 2) if channels_first else grad.double()
    return {"out": out.transpose(1, 2) if channels_first else out, "grad_x": matrix.transpose(1, 2) @ grad}


def assert_right(x, segments, frames, backend, channels_first=False, grad=None, case=""):
    shape = (x.shape[0], x.shape[2], frames) if channels_first else (x.shape[0], frames, x.shape[2])
    grad = torch.randn(shape).to(x) if grad is None else grad
    call = {"channels_first": channels_first}
    got = run(x, segments, frames, grad, backend=backend, **call)
    eager = run(x, segments, frames, grad, function=interpolate_ref, **call)
    assert got["out"].is_contiguous()
    # an output frame sums two products, an input gradient all the frames that read it
    longest = weights(x, segments, frames).count_nonzero(1).max().item()
    assert_parity(got, eager, truth(x, segments, frames, grad, **call), case=case, sums=(2, max(longest, 1)))


@pytest.mark.parametrize("channels_first", [False, True], ids=["BTC", "BCT"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_matches_the_reference(pattern, dtype, channels_first, backend, device):
    x, segments, frames = make(pattern, dtype, device)
    assert_right(x, segments, frames, backend, channels_first, case=f"interpolate {backend} {pattern} {dtype}")


@pytest.mark.parametrize(
    ("src_len", "dst_len", "channels"),
    [
        *((1, 1, 17), (1, 2, 129), (2, 1, 1), (1, 63, 2), (15, 2, 1000), (2, 17, 15), (17, 129, 1), (63, 15, 63)),
        *((15, 63, 2), (129, 17, 1), (63, 129, 15), (1000, 129, 1), (129, 1000, 2)),
    ],
)
def test_odd_sizes(src_len, dst_len, channels, backend, device):
    x = torch.randn(1, src_len, channels, device=device)
    assert_right(x, [(src_len, dst_len)], dst_len, backend, channels_first=channels % 2 == 1)


@pytest.mark.parametrize("case", cases.INTERPOLATE)
def test_use_cases_at_full_size(case, backend, device, full_size):
    case = cases.INTERPOLATE[case]
    x = torch.randn(case.batch, case.tokens, case.channels, device=device)
    assert_right(x, case.segments, case.frames, backend, channels_first=True)


@pytest.mark.parametrize("layout", poison.strided_copies(torch.zeros(1, 1, 1)))
@pytest.mark.parametrize("pattern", ["longer and shorter", "per row"])
def test_any_strides_of_input_and_gradient(layout, pattern, backend, device):
    """Also: nothing around the tensors is read (it is NaN) or written."""
    x, segments, frames = make(pattern, device=device)
    grad = torch.randn(x.shape[0], frames, x.shape[2], device=device)
    want = run(x, segments, frames, grad, backend=backend)
    strided_x, strided_grad = poison.strided_copies(x)[layout], poison.strided_copies(grad)[layout]
    whole = [t if t._base is None else t._base.clone() for t in (strided_x, strided_grad)]
    got = run(strided_x, segments, frames, strided_grad, backend=backend)
    assert torch.equal(got["out"], want["out"])
    assert torch.equal(got["grad_x"], want["grad_x"])
    for tensor, before in zip((strided_x, strided_grad), whole, strict=True):
        after = tensor if tensor._base is None else tensor._base
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_expanded_gradient(backend, device):
    """The gradient of a sum is one element with strides 0."""
    x, segments, frames = make("per row", device=device)
    grad = torch.ones((), device=device).expand(x.shape[0], frames, x.shape[2])
    got = run(x, segments, frames, grad, backend=backend)
    want = run(x, segments, frames, grad.contiguous(), backend=backend)
    assert torch.equal(got["grad_x"], want["grad_x"])


@pytest.mark.parametrize("pattern", ["padded", "per row", "per row, beyond the tensor"])
def test_writes_all_of_its_outputs_and_nothing_else(pattern, kernel_backend, device):
    x, segments, frames = make(pattern, device=device)
    grad = torch.randn(x.shape[0], frames, x.shape[2], device=device)
    want = run(x, segments, frames, grad, backend=kernel_backend)
    guard = poison.guarded_allocations() if kernel_backend == "triton" else contextlib.nullcontext()
    with poison.nan_memory(), guard:
        got = run(x, segments, frames, grad, backend=kernel_backend)
    assert torch.equal(got["out"], want["out"])
    assert torch.equal(got["grad_x"], want["grad_x"])


@pytest.mark.parametrize("fill", [float("nan"), poison.SENTINEL], ids=["nan", "garbage"])
def test_padding_changes_nothing_and_gets_no_gradient(fill, backend, device):
    segments = torch.tensor([[[9, 14], [5, 11]], [[20, 7], [0, 3]], [[0, 0], [0, 0]]], device=device)
    used, filled = segments.sum(1).unbind(1)
    unused = torch.arange(24, device=device) >= used[:, None]
    empty = torch.arange(30, device=device) >= filled[:, None]
    empty[1, 7:] = True  # the second segment has no input
    x = torch.randn(3, 24, 5, device=device)
    grad = torch.randn(3, 30, 5, device=device)
    clean = run(x, segments, 30, grad, backend=backend)
    dirty = run(
        x.masked_fill(unused[..., None], fill),
        segments,
        30,
        grad if backend == "reference" else grad.masked_fill(empty[..., None], fill),
        backend=backend,
    )
    assert torch.equal(dirty["out"], clean["out"])
    assert torch.equal(dirty["grad_x"], clean["grad_x"])
    assert not dirty["out"][empty].any()
    assert not dirty["grad_x"][unused].any()


def test_nan_spreads_to_the_frames_that_read_it_and_no_further(backend, device):
    read = weights(torch.zeros(1, 5, 1), [(5, 8)], 8)[0] != 0
    x, grad = torch.randn(1, 5, 2, device=device), torch.randn(1, 8, 2, device=device)
    x[0, 3], grad[0, 4] = float("nan"), float("nan")
    got = run(x, [(5, 8)], 8, grad, backend=backend)
    assert torch.equal(got["out"].isnan().all(2)[0].cpu(), read[:, 3])
    assert torch.equal(got["grad_x"].isnan().all(2)[0].cpu(), read[4])


def test_lengths_zero(backend, device):
    x = torch.randn(2, 6, 3, device=device)
    nothing = torch.zeros(2, 2, 2, dtype=torch.int64, device=device)
    assert not interpolate(x, nothing, 5, backend=backend).any()
    assert interpolate(x, [(6, 0)], backend=backend).shape == (2, 0, 3)
    assert interpolate(x[:, :0], [(0, 0)], 4, backend=backend).shape == (2, 4, 3)
    assert not interpolate(x[:, :0], [(0, 0)], 4, backend=backend).any()
    assert interpolate(x[:0], [(6, 4)], backend=backend).shape == (0, 4, 3)
    assert interpolate(x[..., :0], [(6, 4)], channels_first=True, backend=backend).shape == (2, 0, 4)
    both = run(x, [(2, 0), (0, 0), (4, 8)], 8, torch.randn(2, 8, 3, device=device), backend=backend)
    assert not both["grad_x"][:, :2].any()
    assert torch.equal(both["out"], interpolate(x[:, 2:], [(4, 8)], backend=backend))
    empty = run(x, [(6, 0)], 0, torch.randn(2, 0, 3, device=device), backend=backend)
    assert not empty["grad_x"].any()


def fused_weights(src_len, dst_len):
    """Weights [dst_len, src_len] in float32, the position rounded once: float64 holds the product exactly."""
    ratio = np.float32(src_len) / np.float32(dst_len)
    src = ((np.arange(dst_len) + 0.5) * np.float64(ratio) - 0.5).astype(np.float32).clip(0)
    i0 = np.minimum(src.astype(np.int64), src_len - 1)
    w = src - i0.astype(np.float32)
    out = np.zeros((dst_len, src_len), np.float32)
    np.add.at(out, (np.arange(dst_len), i0), np.float32(1) - w)
    np.add.at(out, (np.arange(dst_len), np.minimum(i0 + 1, src_len - 1)), w)
    return torch.from_numpy(out)


@pytest.mark.parametrize(("src_len", "dst_len"), [(1, 5), (3, 7), (17, 63), (63, 17), (47, 80), (50, 49), (31, 93)])
@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per row"])
def test_positions_are_exact(src_len, dst_len, per_row, backend, device):
    """One-hot inputs show the weight of every input frame in every output frame, and one-hot gradients the reverse."""
    if backend == "reference" and not per_row and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("PyTorch rounds positions twice on this processor")
    segments = torch.tensor([[[src_len, dst_len]]], device=device) if per_row else [(src_len, dst_len)]
    want = fused_weights(src_len, dst_len).to(device)
    out = interpolate(torch.eye(src_len, device=device)[None], segments, dst_len, backend=backend)
    assert torch.equal(out[0], want)
    x = torch.zeros(1, src_len, dst_len, device=device)
    grad_x = run(x, segments, dst_len, torch.eye(dst_len, device=device)[None], backend=backend)["grad_x"]
    assert torch.equal(grad_x[0], want.T)


def test_float32_equals_torch_bitwise(backend, device):
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("PyTorch rounds positions twice on this processor")
    x = torch.randn(2, 50, 3)
    parts = x[:, :13], x[:, 13:]
    want = torch.cat([F.interpolate(p.mT, size=n, mode="linear") for p, n in zip(parts, (29, 64), strict=True)], 2)
    out = interpolate(x.to(device), [(13, 29), (37, 64)], channels_first=True, backend=backend)
    assert torch.equal(out.cpu(), want)


def test_same_length_is_the_identity(backend, device):
    x = torch.randn(2, 37, 5, device=device)
    grad = torch.randn(2, 37, 5, device=device)
    for segments in ([(37, 37)], [(11, 11), (26, 26)], torch.tensor([[[37, 37]], [[37, 37]]], device=device)):
        both = run(x, segments, 37, grad, backend=backend)
        assert torch.equal(both["out"], x)
        assert torch.equal(both["grad_x"], grad)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_backward_is_the_adjoint(pattern, backend, device):
    x, segments, frames = make(pattern, torch.float64, device)
    y = torch.randn(x.shape[0], frames, x.shape[2], dtype=torch.float64, device=device)
    both = run(x, segments, frames, y, backend=backend)
    left, right = both["out"] * y, x * both["grad_x"]
    assert abs(left.sum() - right.sum()) <= 1e-14 * left.abs().sum()


@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per row"])
def test_gradcheck(per_row, backend, device):
    segments = torch.tensor([[[3, 5], [9, 1]]], device=device) if per_row else [(3, 5), (2, 1)]
    x = torch.randn(1, 5, 1, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: interpolate(x, segments, 7, backend=backend), x)


def test_linear_in_x(backend, device):
    x, segments, frames = make("per row", torch.float64, device)
    y = torch.randn_like(x)

    def f(x):
        return interpolate(x, segments, frames, backend=backend)

    assert torch.equal(f(4 * x), 4 * f(x))
    torch.testing.assert_close(f(x + y), f(x) + f(y), rtol=0, atol=1e-14)


def test_a_row_in_a_batch_equals_the_row_alone(backend, device):
    x, segments, frames = make("per row, four segments", device=device)
    grad = torch.randn(x.shape[0], frames, x.shape[2], device=device)
    batch = run(x, segments, frames, grad, backend=backend)
    for b in range(len(x)):
        row = slice(b, b + 1)
        alone = run(x[row], segments[row], frames, grad[row], backend=backend)
        assert torch.equal(alone["out"], batch["out"][row])
        assert torch.equal(alone["grad_x"], batch["grad_x"][row])


def test_shared_and_per_row_segments_agree(kernel_backend, device):
    x, segments, frames = make("prompt head mid tail", device=device)
    grad = torch.randn(x.shape[0], frames, x.shape[2], device=device)
    shared = run(x, segments, frames, grad, backend=kernel_backend)
    rows = torch.tensor(segments, device=device).expand(x.shape[0], -1, -1)
    for dtype in (torch.int64, torch.int32):
        per_row = run(x, rows.to(dtype), frames, grad, backend=kernel_backend)
        assert torch.equal(per_row["out"], shared["out"])
        assert torch.equal(per_row["grad_x"], shared["grad_x"])


def test_fifty_repeats_are_bitwise_equal(backend, device):
    x = torch.randn(1, 17, 63, device=device)
    grad = torch.randn(1, 29, 63, device=device)
    segments = torch.tensor([[[9, 20], [7, 5]]], device=device)
    first = run(x, segments, 29, grad, backend=backend)
    for _ in range(49):
        again = run(x, segments, 29, grad, backend=backend)
        assert torch.equal(again["out"], first["out"])
        assert torch.equal(again["grad_x"], first["grad_x"])


rows = st.lists(st.tuples(st.integers(-2, 14), st.integers(-2, 14)), min_size=4, max_size=4)


def check_random_segments(table, count, in_frames, frames, backend, device):
    segments = torch.tensor(table, device=device)[:, :count]
    generator = torch.Generator().manual_seed(in_frames)
    x = (torch.rand(len(table), in_frames, 3, generator=generator) + 0.5).to(device)  # positive: no cancellation
    grad = (torch.rand(len(table), frames, 3, generator=generator) + 0.5).to(device)
    got = run(x, segments, frames, grad, backend=backend)
    eager = run(x, segments, frames, grad, function=interpolate_ref)
    want = truth(x, segments, frames, grad)
    for name, value in want.items():
        if value.any():
            assert_parity({name: got[name]}, {name: eager[name]}, {name: value}, sums=(2, 28))
        else:
            assert got[name].shape == value.shape
            assert not got[name].any()


@pytest.mark.parametrize("examples", [{"reference": 60, "cpu": 200, "cuda": 200, "triton": 12}], ids=[""])
def test_random_segments(examples, backend, device):
    @settings(max_examples=examples[backend], deadline=None, derandomize=True, database=None)
    @given(st.lists(rows, min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 20), st.integers(0, 30))
    def check(table, count, in_frames, frames):
        check_random_segments(table, count, in_frames, frames, backend, device)

    check()


class OpNames(TorchDispatchMode):
    """Names of the ops that were dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_backward_runs_on_the_backend_of_the_forward(kernel_backend, device):
    x = torch.randn(1, 5, 2, device=device, requires_grad=True)
    out = interpolate(x, [(5, 8)], backend=kernel_backend)
    with use_backend("reference"), OpNames() as ops:
        out.sum().backward()
    suffix = "_triton" if kernel_backend == "triton" else ""
    assert f"fastflow::interpolate_backward{suffix}" in ops.names


def test_without_gradients_the_op_runs_alone(kernel_backend, device):
    x = torch.randn(1, 5, 2, device=device, requires_grad=True)
    with torch.no_grad(), OpNames() as ops:
        out = interpolate(x, [(5, 8)], backend=kernel_backend)
    assert not out.requires_grad
    assert len(ops.names) == 1


@pytest.mark.parametrize("pattern", ["whole row", "per row"])
def test_saves_the_segments_only(pattern, kernel_backend, device):
    x, segments, frames = make(pattern, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        interpolate(x.requires_grad_(), segments, frames, backend=kernel_backend)
    assert [t.shape for t in saved] == ([segments.shape] if pattern == "per row" else [])


def test_second_derivative_is_refused(kernel_backend, device):
    x = torch.randn(1, 5, 2, device=device, requires_grad=True)
    out = interpolate(x, [(5, 8)], backend=kernel_backend).square().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


OP_SAMPLES = {
    "shared": lambda x, grad, rows: ((x, None, [9, 12, 14, 20], 32, False), (grad, None, [9, 12, 14, 20], 26, False)),
    "per row": lambda x, grad, rows: ((x, rows, [], 32, False), (grad, rows, [], 26, False)),
    "channels first": lambda x, grad, rows: (
        (x, rows, [], 32, True),
        (grad.transpose(1, 2).contiguous(), rows, [], 26, True),
    ),
    "permuted": lambda x, grad, rows: (
        (poison.permuted(x, 1, 2, 0), rows, [], 32, False),
        (poison.permuted(grad, 0, 2, 1), rows, [], 26, False),
    ),
}


@pytest.mark.parametrize("sample", OP_SAMPLES)
def test_opcheck(sample, kernel_backend, device):
    suffix = "_triton" if kernel_backend == "triton" else ""
    x, table, frames = make("per row", device=device, channels=3)
    forward, backward = OP_SAMPLES[sample](x, torch.randn(x.shape[0], frames, 3, device=device), table)
    torch.library.opcheck(getattr(torch.ops.fastflow, "interpolate" + suffix), forward)
    torch.library.opcheck(getattr(torch.ops.fastflow, "interpolate_backward" + suffix), backward)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiles_in_one_graph_and_not_again_for_new_lengths(backend, device, fresh_dynamo):
    def step(x, src_len, dst_len):
        return interpolate(x * 2, [(src_len, dst_len), (5, 9)], channels_first=True, backend=backend).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n, (src_len, dst_len) in enumerate([(12, 20), (15, 28), (13, 29), (18, 11), (7, 7)]):
        x = torch.randn(2, src_len + 5, 3, device=device, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=n > 1):
            loss = compiled(x, src_len, dst_len)
        (grad,) = torch.autograd.grad(loss, x)
        want = step(x, src_len, dst_len)
        (want_grad,) = torch.autograd.grad(want, x)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(grad, want_grad)


def test_compiles_with_lengths_in_a_tensor(backend, device, fresh_dynamo):
    x, segments, frames = make("per row", device=device)
    grad = torch.randn(x.shape[0], frames, x.shape[2], device=device)
    # Inductor's C++ for the reference takes a minute to compile and would test Inductor.
    compiled = torch.compile(interpolate, fullgraph=True, backend="aot_eager" if backend == "reference" else "inductor")
    got = run(x, segments, frames, grad, function=compiled, backend=backend)
    want = run(x, segments, frames, grad, backend=backend)
    torch.testing.assert_close(got["out"], want["out"])
    torch.testing.assert_close(got["grad_x"], want["grad_x"])


class Regulate(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, x, segments):
        return interpolate(x, segments, 32, backend=self.backend)


def test_exports_as_one_node(kernel_backend, device):
    x, segments, _ = make("per row", device=device)
    program = torch.export.export(Regulate(kernel_backend), (x, segments))
    targets = [str(node.target) for node in program.graph.nodes if "fastflow" in str(node.target)]
    assert len(targets) == 1
    assert torch.equal(program.module()(x, segments), Regulate(kernel_backend)(x, segments))


def test_activation_checkpointing(backend, device):
    x, segments, frames = make("per row", device=device)
    x.requires_grad_()
    want = interpolate(x, segments, frames, backend=backend).square().sum()
    got = checkpoint(lambda x: interpolate(x, segments, frames, backend=backend).square().sum(), x, use_reentrant=False)
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0])


@pytest.mark.parametrize("pattern", ["whole row", "per row"])
def test_autocast_leaves_the_dtype_of_x(pattern, backend, device):
    x, segments, frames = make(pattern, torch.float16, device)
    with torch.autocast(device.type, torch.bfloat16):
        out = interpolate(x, segments, frames, backend=backend)
    assert out.dtype == torch.float16
    assert torch.equal(out, interpolate(x, segments, frames, backend=backend))


X = torch.zeros(2, 10, 3)
TABLE = torch.ones(2, 1, 2, dtype=torch.int64)
BAD_INPUT = {
    "two dimensions": ((X[0], [(10, 5)]), ValueError, r"x must have shape \[B, T, C\], got \[10, 3\]"),
    "integers": ((X.long(), [(10, 5)]), TypeError, "x must be float32, .*, got torch.int64"),
    "complex": ((X.cfloat(), [(10, 5)]), TypeError, "x must be float32, .*, got torch.complex64"),
    "too much input": ((X, [(6, 5), (5, 5)]), ValueError, "segments use 11 input frames, but x has 10"),
    "too much output": ((X, [(6, 5)], 4), ValueError, "segments fill 5 output frames, but frames is 4"),
    "negative input": ((X, [(-1, 5)]), ValueError, r"segments must hold lengths >= 0, got \[\(-1, 5\)\]"),
    "negative output": ((X, [(5, -1)]), ValueError, "segments must hold lengths >= 0"),
    "nothing stretched": ((X, [(0, 5)]), ValueError, "an empty input cannot fill output frames"),
    "no segments": ((X, []), ValueError, "segments must hold 1 to 4 segments, got 0"),
    "five segments": ((X, [(1, 1)] * 5), ValueError, "segments must hold 1 to 4 segments, got 5"),
    "float lengths": ((X, [(5.0, 5)]), TypeError, r"segments must hold pairs of ints, got \[\(5.0, 5\)\]"),
    "not pairs": ((X, [(5, 5, 5)]), TypeError, "segments must hold pairs of ints"),
    "table without frames": ((X, TABLE), ValueError, "frames must be given when segments is a tensor"),
    "negative frames": ((X, TABLE, -1), ValueError, "frames must be >= 0, got -1"),
    "table of other rows": ((X, TABLE[:1], 4), ValueError, r"segments must have shape \[2, S, 2\], got \[1, 1, 2\]"),
    "table of numbers": ((X, TABLE[:, :, :1], 4), ValueError, r"segments must have shape \[2, S, 2\]"),
    "flat table": ((X, TABLE[:, 0], 4), ValueError, r"segments must have shape \[2, S, 2\]"),
    "empty table": ((X, TABLE[:, :0], 4), ValueError, "segments must hold 1 to 4 segments, got 0"),
    "table of five": ((X, TABLE.expand(2, 5, 2), 9), ValueError, "segments must hold 1 to 4 segments, got 5"),
    "float table": ((X, TABLE.float(), 4), TypeError, "segments must be int32 or int64, got torch.float32"),
    "other device": ((X, TABLE.to("meta"), 4), ValueError, "segments is on meta but x is on"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case, backend, device):
    (x, segments, *frames), error, message = BAD_INPUT[case]
    if isinstance(segments, torch.Tensor) and segments.device.type != "meta":
        segments = segments.to(device)
    with pytest.raises(error, match=message):
        interpolate(x.to(device), segments, *frames, backend=backend)
