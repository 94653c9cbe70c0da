"""``grouped_conv`` keeps its promises on every backend.  Only ``cpu`` has a kernel; the others are PyTorch's own."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastflow.ops import grouped_conv, grouped_conv_ref
from fastflow.testing import poison
from fastflow.testing.tolerances import assert_parity

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KERNEL = "cpu"


def make(batch=2, frames=19, channels=24, width=36, groups=4, taps=5, dtype=torch.float32, device="cpu"):
    """Tensors by name, the output's gradient, and the groups."""
    shapes = {"x": (batch, frames, channels), "weight": (width, channels // groups, taps), "bias": (width,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors["weight"] /= math.sqrt(taps * channels // groups)
    grad = torch.randn(batch, frames, width)
    return {n: x.to(device, dtype) for n, x in tensors.items()}, grad.to(device, dtype), groups


def run(tensors, grad, groups, *, function=grouped_conv, **kwargs):
    """The output and the gradient of every tensor, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = function(*leaves.values(), groups=groups, **kwargs)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}}


def assert_right(tensors, grad, groups, backend):
    got = run(tensors, grad, groups, backend=backend)
    eager = run(tensors, grad, groups, function=grouped_conv_ref)
    truth = run({n: x.double() for n, x in tensors.items()}, grad.double(), groups, function=grouped_conv_ref)
    (batch, frames, _), (width, inputs, taps) = tensors["x"].shape, tensors["weight"].shape
    sums = inputs * taps, width // groups * taps, batch * frames
    assert_parity(got, eager, truth, case=f"grouped_conv {backend} {grad.dtype}", sums=sums)


def assert_same(got, want):
    for name in want:
        assert torch.equal(got[name], want[name]), name


# ------------------------------------------------------------------------------------------------ numbers
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(dtype, backend, device):
    assert_right(*make(frames=200, dtype=dtype, device=device), backend)


@pytest.mark.parametrize(
    ("frames", "channels", "width", "groups", "taps"),
    [(1, 1, 1, 1, 1), (2, 15, 30, 15, 3), (17, 63, 63, 1, 2), (129, 17, 34, 17, 31), (300, 66, 33, 1, 17),
     (31, 128, 64, 2, 32), (63, 40, 200, 2, 9)],
)  # fmt: skip
def test_odd_sizes(frames, channels, width, groups, taps, backend, device):
    assert_right(*make(2, frames, channels, width, groups, taps, device=device), backend)


def test_the_size_of_cosyvoice_3(backend, device):
    assert_right(*make(2, 301, 1024, 1024, 16, 31, device=device), backend)


def test_is_the_convolution_and_mish_of_the_past(backend, device):
    """The formula, written out."""
    tensors, _, groups = make(device=device)
    x, weight, bias = tensors.values()
    y = bias.expand(2, 19, 36).clone()
    for g in range(groups):
        inputs, outputs = slice(6 * g, 6 * g + 6), slice(9 * g, 9 * g + 9)
        for t in range(19):
            for k in range(max(0, 4 - t), 5):
                y[:, t, outputs] += x[:, t - 4 + k, inputs] @ weight[outputs, :, k].T
    torch.testing.assert_close(grouped_conv(x, weight, bias, groups=groups, backend=backend), F.mish(y))


def test_later_frames_change_nothing(backend, device):
    """And the gradient of what is not looked at is zero."""
    tensors, grad, groups = make(device=device)
    want = run(tensors, grad, groups, backend=backend)["out"]
    tensors["x"][:, 10:] = 1e3
    leaf = tensors["x"].requires_grad_()
    got = grouped_conv(leaf, tensors["weight"], tensors["bias"], groups=groups, backend=backend)[:, :10]
    torch.testing.assert_close(got, want[:, :10])
    assert not torch.autograd.grad(got.sum(), leaf)[0][:, 10:].any()


def test_without_a_bias(backend, device):
    tensors, _, groups = make(device=device)
    got = grouped_conv(tensors["x"], tensors["weight"], None, groups=groups, backend=backend)
    want = grouped_conv(tensors["x"], tensors["weight"], torch.zeros(36, device=device), groups=groups, backend=backend)
    assert torch.equal(got, want)


def test_outliers_in_float16(backend, device):
    """What lies beyond float16 becomes its largest number."""
    tensors, _, groups = make(dtype=torch.float16, device=device)
    tensors["x"] *= 1e4
    tensors["weight"] *= 100
    out = grouped_conv(*tensors.values(), groups=groups, backend=backend)
    assert out.isfinite().all()
    assert out.max() == torch.finfo(torch.float16).max


def test_a_gradient_beyond_float16_is_infinite(backend, device):
    """By which a scaler of the loss sees that its scale is too large."""
    tensors, grad, groups = make(dtype=torch.float16, device=device)
    grads = run(tensors, torch.full_like(grad, 3e4), groups, backend=backend)
    assert grads["grad_bias"].isinf().any()


# ------------------------------------------------------------------------------------------------ memory
@pytest.mark.parametrize("layout", poison.strided_copies(torch.zeros(1, 1, 1)))
def test_any_strides(layout, backend, device):
    """Also: nothing around the tensors is read, which is NaN."""
    tensors, grad, groups = make(device=device)
    want = run(tensors, grad, groups, backend=backend)
    strided = {n: poison.embedded(poison.permuted(t, *range(t.dim())[::-1])) for n, t in tensors.items()}
    strided["x"] = poison.strided_copies(tensors["x"])[layout]
    got = run(strided, poison.strided_copies(grad)[layout], groups, backend=backend)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_writes_all_of_its_outputs(backend, device):
    case = make(device=device)
    want = run(*case, backend=backend)
    with poison.nan_memory():
        assert_same(run(*case, backend=backend), want)


def test_leaves_nothing_from_call_to_call(backend, device):
    """Memory that the threads keep was used by a larger call, of NaN, before either pass."""
    tensors, grad, groups = make(device=device)
    want = run(tensors, grad, groups, backend=backend)

    def poison_memory():
        larger, gradient, count = make(frames=500, channels=96, width=96, taps=9, device=device)
        run({name: torch.full_like(x, math.nan) for name, x in larger.items()}, gradient, count, backend=backend)

    leaves = [x.requires_grad_() for x in tensors.values()]
    poison_memory()
    out = grouped_conv(*leaves, groups=groups, backend=backend)
    poison_memory()
    grads = torch.autograd.grad(out, leaves, grad)
    assert_same(dict(zip(want, (out, *grads), strict=True)), want)


def test_saves_its_input_and_the_convolution_only():
    tensors, _, groups = make()
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    known = {x.data_ptr() for x in leaves.values()}
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * (t.data_ptr() not in known)) or t, lambda t: t
    ):
        grouped_conv(*leaves.values(), groups=groups, backend=KERNEL)
    assert sum(sizes) == 2 * 19 * 36


@pytest.mark.parametrize(("batch", "frames"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_do(batch, frames, backend, device):
    got = run(*make(batch, frames, device=device), backend=backend)
    assert got["out"].shape == (batch, frames, 36)
    for name, x in got.items():
        assert not x.any(), name


# ------------------------------------------------------------------------------------------------ autograd and torch
def test_gradcheck(backend, device):
    tensors, _, groups = make(2, 5, 4, 6, 2, 3, dtype=torch.float64, device=device)
    given = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(lambda *args: grouped_conv(*args, groups=groups, backend=backend), given)


def test_only_the_gradients_asked_for(backend, device):
    tensors, grad, groups = make(device=device)
    want = run(tensors, grad, groups, backend=backend)
    for name in tensors:
        chosen = {n: x.detach().requires_grad_(n == name) for n, x in tensors.items()}
        out = grouped_conv(*chosen.values(), groups=groups, backend=backend)
        (got,) = torch.autograd.grad(out, chosen[name], grad)
        torch.testing.assert_close(got, want[f"grad_{name}"])
    with torch.no_grad():
        assert not grouped_conv(*chosen.values(), groups=groups, backend=backend).requires_grad


def test_repeats_and_numbers_of_threads_are_bitwise_equal():
    case = make(frames=300, channels=96, width=96)
    first = run(*case, backend=KERNEL)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for _ in range(17):
                assert_same(run(*case, backend=KERNEL), first)
    finally:
        torch.set_num_threads(threads)


def test_second_derivative_is_refused():
    tensors, _, groups = make()
    out = grouped_conv(*(x.requires_grad_() for x in tensors.values()), groups=groups, backend=KERNEL)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_opcheck():
    tensors, grad, groups = make(frames=5)
    for save in (True, False):
        torch.library.opcheck(torch.ops.fastflow.grouped_conv, (*tensors.values(), groups, save))
    _, y = torch.ops.fastflow.grouped_conv(*tensors.values(), groups, True)
    for wanted in (0b111, 0b010):
        given = (grad, y, tensors["x"], tensors["weight"], groups, wanted)
        torch.library.opcheck(torch.ops.fastflow.grouped_conv_backward, given)


def test_compiles_in_one_graph_with_its_backward_pass(backend, device):
    torch._dynamo.reset()
    case = make(device=device)

    def function(*args, **kwargs):
        return grouped_conv(*args, **kwargs, backend=backend)

    want = run(*case, function=function)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = run(*case, function=compiled)
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, backend, device):
    """The result has autocast's dtype, gradients those of what was given; a CPU's kernel rounds the result alone."""
    tensors, grad, groups = make(device=device)
    want = run(tensors, grad, groups, backend=backend)
    with torch.autocast(device.type, dtype):
        got = run(tensors, grad.to(dtype), groups, backend=backend)
    assert got["out"].dtype == dtype
    for name, x in want.items():
        if backend == KERNEL and name == "out":
            assert torch.equal(got[name], x.to(dtype))
        assert name == "out" or got[name].dtype == x.dtype
        error = (got[name].float() - x).abs().max() / x.abs().max()
        assert error < 8 * torch.finfo(dtype).eps, name


X, WEIGHT, BIAS = torch.zeros(2, 5, 24), torch.zeros(36, 6, 3), torch.zeros(36)
BAD_INPUT = {
    "two dimensions": ((X[0], WEIGHT, BIAS, 4), r"x must have shape \[B, T, C\]"),
    "integers": ((X.long(), WEIGHT, BIAS, 4), "floating dtype"),
    "no group": ((X, WEIGHT, BIAS, 0), "groups must divide the 24 channels of x, got 0"),
    "groups that do not divide": ((X, WEIGHT, BIAS, 5), "groups must divide the 24 channels of x, got 5"),
    "weight of another group": ((X, WEIGHT[:, :5], BIAS, 4), r"weight must have shape \[C', 6, K\].*got \[36, 5, 3\]"),
    "width that groups do not divide": ((X, WEIGHT[:35], BIAS[:35], 4), r"got \[35, 6, 3\]"),
    "no taps": ((X, WEIGHT[..., :0], BIAS, 4), r"got \[36, 6, 0\]"),
    "weight of another dtype": ((X, WEIGHT.double(), BIAS, 4), "weight is torch.float64 on cpu but x is torch.float32"),
    "bias of another shape": ((X, WEIGHT, BIAS[:35], 4), r"bias must have shape \[36\], got \[35\]"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case, backend):
    (x, weight, bias, groups), message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        grouped_conv(x, weight, bias, groups=groups, backend=backend)


@pytest.mark.parametrize("case", ["no group", "weight of another group", "no taps", "bias of another shape"])
def test_the_op_itself_refuses_bad_input(case):
    """Also where somebody calls it without the public function."""
    x, weight, bias, groups = BAD_INPUT[case][0]
    with pytest.raises(RuntimeError):
        torch.ops.fastflow.grouped_conv(x, weight, bias, groups, True)
