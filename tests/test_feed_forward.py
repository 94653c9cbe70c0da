"""``feed_forward`` keeps its promises on every backend."""

import pathlib
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastflow.ops import Norm, feed_forward, feed_forward_ref
from fastflow.ops.feed_forward import ACTIVATIONS
from fastflow.ops.registry import op
from fastflow.testing import poison
from fastflow.testing.tolerances import assert_parity

HALVES = (torch.float16, torch.bfloat16)
SIZES = [(1, 1, 15, 1), (2, 2, 17, 63), (3, 15, 63, 17), (2, 17, 129, 2), (1, 63, 1, 257), (2, 129, 33, 300),
         (1, 2, 300, 513)]  # fmt: skip

# What a case has besides x, w1 and w2, and how it is called; a capital B means one of each for every row.
CASES = {
    "plain": ("", {"activation": "gelu"}),
    "no residual": ("b1 b2", {"activation": "silu", "residual": False}),
    "u-net": ("b1 b2 scale shift", {"activation": "gelu"}),
    "conformer": ("b1 b2 scale shift", {"activation": "silu"}),
    "dit": ("b1 b2 scaleB shiftB gate", {"activation": "gelu_tanh"}),
    "gate without bias": ("b1 gate", {"activation": "gelu_tanh"}),
}


def make(case, dtype=torch.float32, device="cpu", batch=2, frames=19, channels=24, hidden=37):
    """Tensors by name, the output's gradient, and the other arguments of a case."""
    parts, rule = CASES[case]
    shapes = {
        "x": (batch, frames, channels), "w1": (hidden, channels), "b1": (hidden,), "w2": (channels, hidden),
        "b2": (channels,), "scale": (channels,), "shift": (channels,), "scaleB": (batch, channels),
        "shiftB": (batch, channels), "gate": (batch, channels),
    }  # fmt: skip
    names = ["x", "w1", "w2", *parts.split()]
    tensors = {name.rstrip("B"): torch.randn(shapes[name]) for name in names}
    tensors["w1"] /= channels**0.5
    tensors["w2"] /= hidden**0.5
    tensors = {name: t.to(device, dtype) for name, t in tensors.items()}
    return tensors, torch.randn(shapes["x"]).to(device, dtype), rule


def call(function, tensors, rule, **kwargs):
    norm = Norm(tensors["scale"], tensors["shift"], 1e-5) if "scale" in tensors else None
    arguments = (tensors.get(name) for name in ("x", "w1", "b1", "w2", "b2"))
    return function(*arguments, norm=norm, gate=tensors.get("gate"), **rule, **kwargs)


def run(tensors, grad, rule, *, function=feed_forward, **kwargs):
    """The output and the gradient of every tensor, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = call(function, leaves, rule, **kwargs)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}}


def assert_right(tensors, grad, rule, backend, case=""):
    got = run(tensors, grad, rule, backend=backend)
    eager = run(tensors, grad, rule, function=feed_forward_ref)
    truth = run({n: x.double() for n, x in tensors.items()}, grad.double(), rule, function=feed_forward_ref)
    (batch, frames, channels), hidden = tensors["x"].shape, tensors["w1"].shape[0]
    assert_parity(got, eager, truth, case=case, sums=(channels, hidden, batch * frames))


def assert_same(got, want):
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case, dtype, backend, device):
    assert_right(*make(case, dtype, device), backend, f"feed_forward {backend} {case} {dtype}")


@pytest.mark.parametrize(("batch", "frames", "channels", "hidden"), SIZES)
@pytest.mark.parametrize("case", ["no residual", "dit"])
def test_odd_sizes(case, batch, frames, channels, hidden, backend, device):
    tensors, grad, rule = make(case, device=device, batch=batch, frames=frames, channels=channels, hidden=hidden)
    if channels == 1 and "gate" in tensors:
        pytest.skip("the gradient of the gate is one number, which the reference may hit by chance")
    if channels == 1:  # whose norm is zero
        tensors = {n: t for n, t in tensors.items() if n not in ("scale", "shift")}
    assert_right(tensors, grad, rule, backend, f"feed_forward {backend} {channels} -> {hidden}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_use_cases_at_full_size(dtype, kernel_backend, device, full_size):
    unet = make("u-net", dtype, device, frames=129, channels=256, hidden=1024)
    assert_right(*unet, kernel_backend, f"feed_forward {kernel_backend} u-net")
    dit = make("dit", dtype, device, frames=25, channels=1024, hidden=2048)
    assert_right(*dit, kernel_backend, f"feed_forward {kernel_backend} dit")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(activation, dtype, kernel_backend, device):
    """One channel passes through unit weights, so what comes back is the activation and its derivative alone."""
    dense = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    far = torch.tensor([-1e9, -1e4, -700.0, -100.0, 100.0, 700.0, 1e4, 1e9], dtype=torch.float64)
    one = torch.ones(1, 1, device=device, dtype=dtype)
    for values in (dense, far):
        x = values.to(device, dtype)[None, :, None].requires_grad_()
        y = feed_forward(x, one, None, one, None, activation=activation, residual=False, backend=kernel_backend)
        (grad,) = torch.autograd.grad(y.sum(), x)
        exact = x.detach().double().requires_grad_()
        want = ACTIVATIONS[activation](exact)
        (want_grad,) = torch.autograd.grad(want.sum(), exact)
        # In float64 the reference has errors of its own, from 1 - tanh(u)**2.
        eps = torch.finfo(dtype).eps * (8 if dtype == torch.float64 else 1)
        torch.testing.assert_close(y.double(), want, rtol=2 * eps, atol=2 * eps)
        torch.testing.assert_close(grad.double(), want_grad, rtol=2 * eps, atol=4 * eps)


FORMULAS = """
#include <cstdio>
#include "linear.h"
using namespace fastflow;
template <typename Real> void print(Activation activation, double x) {
  const auto result = activate(activation, static_cast<Real>(x));
  std::printf("%.17g %.17g ", double(result.value), double(result.derivative));
}
int main() {
  for (int n = 1; n <= 3; ++n)
    for (int i = -4800; i <= 4800; ++i) {
      print<float>(Activation(n), i / 400.0f);
      print<double>(Activation(n), i / 400.0f);
    }
}
"""


def test_formulas_of_the_cuda_kernels(tmp_path):
    """They are in csrc/linear.h, which a CPU can run too."""
    compiler, source = shutil.which("c++"), pathlib.Path(__file__).parent.parent / "csrc"
    if compiler is None or not source.exists():
        pytest.skip("not run: it needs a C++ compiler and the source tree")
    (tmp_path / "formulas.cpp").write_text(FORMULAS)
    command = [compiler, "-std=c++17", "-I", source, tmp_path / "formulas.cpp", "-o", tmp_path / "formulas"]
    subprocess.run(command, check=True)
    output = subprocess.run([tmp_path / "formulas"], check=True, capture_output=True, text=True).stdout
    found = torch.tensor([float(number) for number in output.split()], dtype=torch.float64).view(3, -1, 2, 2)
    x = (torch.arange(-4800, 4801) / 400).double().requires_grad_()
    for name, results in zip(ACTIVATIONS, found, strict=True):
        want = ACTIVATIONS[name](x)
        (want_grad,) = torch.autograd.grad(want.sum(), x)
        for got, dtype in zip(results.unbind(1), (torch.float32, torch.float64), strict=True):
            eps = torch.finfo(dtype).eps * (8 if dtype == torch.float64 else 1)
            torch.testing.assert_close(got[:, 0], want.detach(), rtol=2 * eps, atol=2 * eps)
            torch.testing.assert_close(got[:, 1], want_grad, rtol=2 * eps, atol=4 * eps)


def test_is_norm_linear_gelu_linear(backend, device):
    tensors, _, rule = make("u-net", device=device)
    x, w1, w2, b1, b2, scale, shift = tensors.values()
    hidden = F.gelu(F.linear(F.layer_norm(x, (24,), scale, shift, 1e-5), w1, b1))
    torch.testing.assert_close(call(feed_forward, tensors, rule, backend=backend), x + F.linear(hidden, w2, b2))


def test_may_change_the_number_of_channels(backend, device):
    tensors, grad, rule = make("no residual", device=device)
    tensors |= {"w2": tensors["w2"][:7], "b2": tensors["b2"][:7]}
    assert_right(tensors, grad[..., :7], rule, backend, "24 -> 7")


def test_outliers(backend, device):
    tensors, grad, rule = make("plain", device=device)
    tensors["x"][0, 3] *= 1e3
    assert_right(tensors, grad, rule, backend, f"feed_forward {backend} outliers")


def test_a_frame_does_not_see_another(kernel_backend, device):
    tensors, _, rule = make("dit", device=device)
    want = call(feed_forward, tensors, rule, backend=kernel_backend)
    tensors["x"][0, 3] = float("nan")
    got = call(feed_forward, tensors, rule, backend=kernel_backend)
    assert got[0, 3].isnan().all()
    got[0, 3] = want[0, 3]
    assert torch.equal(got, want)


@pytest.mark.parametrize(("batch", "frames"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("case", ["no residual", "dit"])
def test_nothing_to_do(case, batch, frames, backend, device):
    got = run(*make(case, device=device, batch=batch, frames=frames), backend=backend)
    assert got["out"].shape == (batch, frames, 24)
    assert not any(x.any() for x in got.values())


# ------------------------------------------------------------------------------------------------ memory
def test_parameters_of_any_strides(backend, device):
    tensors, grad, rule = make("dit", device=device)
    want = run(tensors, grad, rule, backend=backend)
    got = run({n: x if n == "x" else poison.spread(x) for n, x in tensors.items()}, grad, rule, backend=backend)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("layout", poison.strided_copies(torch.zeros(1, 1, 1)))
def test_any_strides(layout, backend, device):
    """Also: nothing around the tensors is read, which is NaN."""
    tensors, grad, rule = make("dit", device=device)
    want = run(tensors, grad, rule, backend=backend)
    other = {name: poison.embedded(poison.permuted(x, *range(x.dim())[::-1])) for name, x in tensors.items()}
    other["x"] = poison.strided_copies(tensors["x"])[layout]
    got = run(other, poison.strided_copies(grad)[layout], rule, backend=backend)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_expanded_gradient(backend, device):
    """The gradient of a sum is one element with strides 0."""
    for case in ("no residual", "dit"):
        tensors, grad, rule = make(case, device=device)
        ones = torch.ones_like(grad)
        want = run(tensors, ones, rule, backend=backend)
        got = run(tensors, ones[:1, :1, :1].expand_as(grad), rule, backend=backend)
        for name in want:
            torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("case", ["no residual", "dit"])
def test_writes_all_of_its_outputs_and_nothing_else(case, kernel_backend, device):
    arguments = make(case, device=device)
    want = run(*arguments, backend=kernel_backend)
    with poison.nan_memory():
        got = run(*arguments, backend=kernel_backend)
    assert_same(got, want)
    with poison.guarded_allocations():
        got = run(*arguments, backend=kernel_backend)
    assert_same(got, want)


def test_saves_one_hidden_tensor(kernel_backend, device):
    tensors, _, rule = make("dit", device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(feed_forward, {n: t.requires_grad_() for n, t in tensors.items()}, rule, backend=kernel_backend)
    own = {t.data_ptr() for t in tensors.values()}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in own) == 2 * 19 * (37 + 2) * 4


# ------------------------------------------------------------------------------------------------ autograd and torch
@pytest.mark.parametrize("case", ["no residual", "u-net", "conformer", "dit", "gate without bias"])
def test_gradcheck(case, backend, device):
    tensors, _, rule = make(case, torch.float64, device, frames=3, channels=4, hidden=5)

    def function(*values):
        return call(feed_forward, dict(zip(tensors, values, strict=True)), rule, backend=backend)

    assert torch.autograd.gradcheck(
        function, [x.requires_grad_() for x in tensors.values()], fast_mode=backend == "triton"
    )


def test_repeats_are_bitwise_equal(backend, device):
    interpreted = backend == "triton" and device.type == "cpu"
    case = make("dit", device=device, frames=34 if interpreted else 130)
    first = run(*case, backend=backend)
    for _ in range(4 if interpreted else 49):
        assert_same(run(*case, backend=backend), first)


def test_threads_do_not_change_the_result():
    tensors, _, rule = make("dit", frames=130)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call(feed_forward, tensors, rule, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_second_derivative_is_refused(kernel_backend, device):
    tensors, _, rule = make("u-net", device=device)
    out = call(feed_forward, {n: x.requires_grad_() for n, x in tensors.items()}, rule, backend=kernel_backend)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["x", "w1", "b1", "w2", "b2", "scale", "shift", "gate"])
def test_only_the_gradients_asked_for(name, backend, device):
    tensors, grad, rule = make("dit", device=device)
    want = run(tensors, grad, rule, backend=backend)
    tensors[name].requires_grad_()
    out = call(feed_forward, tensors, rule, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(out, tensors[name], grad)[0], want[f"grad_{name}"])
    with torch.no_grad():
        assert not call(feed_forward, tensors, rule, backend=backend).requires_grad


def test_opcheck(kernel_backend, device):
    t, _, _ = make("dit", device=device)
    arguments = (t["x"], t["w1"], t["b1"], t["w2"], t["b2"], 2, t["scale"], t["shift"], 1e-5, t["gate"], True)
    forward = op("feed_forward", kernel_backend)
    for save_hidden in (True, False):
        torch.library.opcheck(forward, (*arguments, save_hidden))
    hidden = forward(*arguments, True)[2]
    if kernel_backend != "cpu":
        torch.library.opcheck(op("activation_forward", kernel_backend), (hidden, 3))
        torch.library.opcheck(op("activation_backward", kernel_backend), (torch.randn_like(hidden), hidden, 3))


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (True, False, False)], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_opcheck_of_the_backward_pass_of_a_cpu(gated, wanted):
    t, grad, _ = make("dit")
    hidden, stats = torch.randn(*t["x"].shape[:2], t["w1"].shape[0]), torch.randn(2, *t["x"].shape[:2])
    gate = t["gate"] if gated else None
    for norm in ((t["scale"], t["shift"], True), (None, None, False)):
        given = (grad, grad, t["x"], stats, hidden, t["w1"], t["w2"], t["b2"], 2, *norm, gate, True, *wanted)
        torch.library.opcheck(op("feed_forward_backward", "cpu"), given)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiles_in_one_graph_and_not_again_for_new_lengths(backend, device, fresh_dynamo):
    compiled = torch.compile(lambda t, rule: call(feed_forward, t, rule, backend=backend), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    for n, frames in enumerate([5, 9, 13]):
        tensors, grad, rule = make("dit", device=device, frames=frames)
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        with torch._dynamo.config.patch(error_on_recompile=n > 1):
            out = compiled(leaves, rule)
        got = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
        want = run(tensors, grad, rule, backend=backend)
        torch.testing.assert_close(out.detach(), want["out"])
        for name, x in got.items():
            torch.testing.assert_close(x, want[f"grad_{name}"])


def test_activation_checkpointing(backend, device):
    tensors, grad, rule = make("dit", device=device)
    want = run(tensors, grad, rule, backend=backend)

    def step(values):
        return call(feed_forward, dict(zip(tensors, values, strict=True)), rule, backend=backend)

    leaves = [x.requires_grad_() for x in tensors.values()]
    out = checkpoint(step, leaves, use_reentrant=False)
    for name, g in zip(tensors, torch.autograd.grad(out, leaves, grad), strict=True):
        torch.testing.assert_close(g, want[f"grad_{name}"])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_autocast_loses_no_more_than_in_the_reference(case, dtype, backend, device):
    """From a float32 x, and from one that autocast's layers hand over; residual and gradients keep their dtype."""
    tensors, grad, rule = make(case, device=device)
    for x in (tensors["x"], tensors["x"].to(dtype)):
        given, grad = tensors | {"x": x}, grad.to(x.dtype if rule.get("residual", True) else dtype)
        with torch.autocast(device.type, dtype):
            got, eager = (run(given, grad, rule, backend=name) for name in (backend, "reference"))
        truth = run({n: t.double() for n, t in given.items()}, grad.double(), rule, function=feed_forward_ref)
        assert got["out"].dtype == grad.dtype
        got, eager = ({n: t.to(dtype) for n, t in results.items()} for results in (got, eager))  # whose rule it is
        assert_parity(got, eager, truth, case=f"autocast {case} {x.dtype}", sums=(24, 37, 2 * 19))


def test_autocast_on_a_cpu_rounds_the_result_alone():
    """The kernel multiplies in float32 in any case, so the weights keep their digits."""
    tensors, _, rule = make("no residual")
    want = call(feed_forward, tensors, rule, backend="cpu").bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(feed_forward, tensors, rule, backend="cpu"), want)


def test_autocast_leaves_float64(backend, device):
    tensors, grad, rule = make("dit", torch.float64, device)
    want = run(tensors, grad, rule, backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        assert_same(run(tensors, grad, rule, backend=backend), want)


def test_autocast_normalises_in_float32(backend, device):
    x, w1, w2 = 1000 + torch.randn(2, 7, 16), torch.randn(24, 16), torch.randn(16, 24)
    x, w1, w2 = x.to(device), w1.to(device), w2.to(device)
    rule = {"activation": "gelu", "norm": Norm(None, None, 1e-5), "residual": False}
    with torch.autocast(device.type, torch.bfloat16):
        got = feed_forward(x, w1, None, w2, None, **rule, backend=backend)
    want = feed_forward_ref(x, w1, None, w2, None, **rule)
    torch.testing.assert_close(got.float() / want.abs().max(), want / want.abs().max(), rtol=0, atol=0.03)


# ------------------------------------------------------------------------------------------------ bad input
X, W1, B1, W2, B2 = torch.zeros(2, 5, 8), torch.zeros(6, 8), torch.zeros(6), torch.zeros(8, 6), torch.zeros(8)
BAD_INPUT = {
    "two dimensions": ({"x": X[0]}, r"x must have shape \[B, T, C\].*got \[5, 8\]"),
    "integers": ({"x": X.long()}, "x must have .* a floating dtype, got .* torch.int64"),
    "relu": ({"activation": "relu"}, "activation must be one of gelu, gelu_tanh, silu; got 'relu'"),
    "narrow w1": ({"w1": W1[:, :7]}, r"w1 must have shape \[H, 8\] with H > 0, got \[6, 7\]"),
    "nothing hidden": ({"w1": W1[:0], "w2": W2[:, :0]}, "H > 0"),
    "short b1": ({"b1": B1[:5]}, r"b1 must have shape \[6\], got \[5\]"),
    "narrow w2": ({"w2": W2[:, :5]}, r"w2 must have shape \[N, 6\], got \[8, 5\]"),
    "short w2": ({"w2": W2[:7]}, r"with a residual, w2 must have shape \[8, 6\], got \[7, 6\]"),
    "double b2": ({"b2": B2.double()}, "b2 is torch.float64 on .* but x is torch.float32"),
    "w1 elsewhere": ({"w1": W1.to("meta")}, "w1 is torch.float32 on meta"),
    "short scale": ({"norm": Norm(B1, None, 1e-5)}, r"norm.scale must have shape \[8\], got \[6\]"),
    "gate of channels": ({"gate": B2}, r"gate must have shape \[2, 8\], got \[8\]"),
    "gate alone": ({"gate": X[:, 0], "residual": False}, "gate needs residual=True"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case, backend):
    change, message = BAD_INPUT[case]
    arguments = {"x": X, "w1": W1, "b1": B1, "w2": W2, "b2": B2, "activation": "gelu"} | change
    with pytest.raises(ValueError, match=message):
        feed_forward(**arguments, backend=backend)


def test_autocast_around_the_backward_pass_changes_no_product(kernel_backend, device):
    """What the backward pass restores has the dtype of the forward pass."""
    torch.manual_seed(0)
    shapes = (2, 5, 24), (48, 24), (48,), (24, 48), (24,)
    leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    gradients = []
    for keep_hidden in (True, False):
        out = feed_forward(*leaves, activation="silu", keep_hidden=keep_hidden, backend=kernel_backend)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            gradients.append(torch.autograd.grad(out.sum(), leaves))
    for kept, restored in zip(*gradients, strict=True):
        torch.testing.assert_close(restored, kept)
