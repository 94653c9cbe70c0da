"""``projection`` keeps its promises on every backend, and so does the norm that it shares with ``feed_forward``."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastflow.ops import Norm, projection, projection_ref
from fastflow.ops.registry import op
from fastflow.testing import poison
from fastflow.testing.tolerances import assert_parity

HALVES = (torch.float16, torch.bfloat16)
SIZES = [(1, 1, 1, (1,)), (2, 2, 15, (17,)), (1, 15, 63, (2, 1)), (3, 17, 2, (15, 63, 17)), (2, 63, 17, (129,)),
         (2, 129, 129, (63, 2, 64)), (1, 65, 300, (70,))]  # fmt: skip

# What a case has besides x and weights; a capital B means one of each for every row.
CASES = {
    "plain": "",
    "bias": "bias",
    "norm": "scale shift",
    "bare norm": "norm",
    "norm without shift": "scale bias",
    "adaptive norm": "scaleB shiftB bias",
    "shift only": "shiftB",
    "residual": "bias residual",
    "gate": "bias residual gate",
    "gate without bias": "residual gate",
    "everything": "scaleB shiftB bias residual gate",
}


def make(case, dtype=torch.float32, device="cpu", batch=2, frames=19, channels=24, widths=(16, 9)):
    """Tensors by name, and the output's gradient."""
    parts, width = CASES[case].split(), sum(widths)
    shapes = {"x": (batch, frames, channels)}
    shapes |= {f"weight{i}": (n, channels) for i, n in enumerate(widths)}
    if "bias" in parts:  # not of the second
        shapes |= {f"bias{i}": (n,) for i, n in enumerate(widths) if i != 1}
    for name in ("scale", "shift"):
        if name in parts:
            shapes[name] = (channels,)
        if name + "B" in parts:
            shapes[name] = (batch, channels)
    if "residual" in parts:
        shapes["residual"] = (batch, frames, width)
    if "gate" in parts:
        shapes["gate"] = (batch, width)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    for i in range(len(widths)):
        tensors[f"weight{i}"] /= channels**0.5
    if "norm" in parts:
        tensors["norm"] = torch.zeros(0)  # a mark
    return {n: t.to(device, dtype) for n, t in tensors.items()}, torch.randn(batch, frames, width).to(device, dtype)


def call(function, tensors, **kwargs):
    count = sum(name.startswith("weight") for name in tensors)
    norm = None
    if tensors.keys() & {"norm", "scale", "shift"}:
        norm = Norm(tensors.get("scale"), tensors.get("shift"), 1e-5)
    return function(
        tensors["x"], [tensors[f"weight{i}"] for i in range(count)], [tensors.get(f"bias{i}") for i in range(count)],
        norm=norm, residual=tensors.get("residual"), gate=tensors.get("gate"), **kwargs,
    )  # fmt: skip


def run(tensors, grad, *, function=projection, **kwargs):
    """The output and the gradient of every tensor, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = call(function, leaves, **kwargs)
    leaves.pop("norm", None)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}}


def assert_right(tensors, grad, backend, case=""):
    got = run(tensors, grad, backend=backend)
    eager = run(tensors, grad, function=projection_ref)
    truth = run({n: x.double() for n, x in tensors.items()}, grad.double(), function=projection_ref)
    batch, frames, channels = tensors["x"].shape
    assert_parity(got, eager, truth, case=case, sums=(channels, grad.shape[2], batch * frames))


def assert_same(got, want):
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case, dtype, backend, device):
    assert_right(*make(case, dtype, device), backend, f"projection {backend} {case} {dtype}")


@pytest.mark.parametrize(("batch", "frames", "channels", "widths"), SIZES)
@pytest.mark.parametrize("case", ["bias", "everything"])
def test_odd_sizes(case, batch, frames, channels, widths, backend, device):
    if case == "everything" and channels == 1:
        pytest.skip("the norm of a single channel is zero")
    tensors, grad = make(case, device=device, batch=batch, frames=frames, channels=channels, widths=widths)
    if channels == 2:  # whose norm is nearly +-1, so x has no gradient: leave the norm out
        tensors = {n: t for n, t in tensors.items() if n not in ("scale", "shift")}
    assert_right(tensors, grad, backend, f"projection {backend} {channels} -> {widths}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_use_cases_at_full_size(dtype, kernel_backend, device, full_size):
    qkv = make("norm", dtype, device, frames=258, channels=256, widths=(512,) * 3)
    assert_right(*qkv, kernel_backend, f"projection {kernel_backend} qkv")
    adaptive = make("everything", dtype, device, frames=70, channels=1024, widths=(1024,))
    assert_right(*adaptive, kernel_backend, f"projection {kernel_backend} adaptive")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 4, 15, 16, 17])
def test_few_frames(batch, dtype, backend, device):
    """As those of a time embedding, which the CPU multiplies by another kernel up to 16."""
    tensors, grad = make("bias", dtype, device, batch=batch, frames=1, channels=301, widths=(523, 17))
    assert_right(tensors, grad, backend, f"projection {backend} {batch} frames {dtype}")


def test_is_layer_norm_and_linear(backend, device):
    tensors, _ = make("norm", device=device, widths=(16,))
    x = F.layer_norm(tensors["x"], (24,), tensors["scale"], tensors["shift"], 1e-5)
    torch.testing.assert_close(call(projection, tensors, backend=backend), F.linear(x, tensors["weight0"]))


def test_outliers(backend, device):
    """A frame far from zero, whose variance is the difference of large sums."""
    tensors, grad = make("norm", device=device)
    tensors["x"][0, 3] += 1e3
    tensors["x"][1, 5, 2] *= 1e3
    assert_right(tensors, grad, backend, f"projection {backend} outliers")


def test_a_frame_does_not_see_another(kernel_backend, device):
    tensors, _ = make("adaptive norm", device=device)
    want = call(projection, tensors, backend=kernel_backend)
    tensors["x"][0, 3] = float("nan")
    got = call(projection, tensors, backend=kernel_backend)
    assert got[0, 3].isnan().all()
    got[0, 3] = want[0, 3]
    assert torch.equal(got, want)


@pytest.mark.parametrize(("batch", "frames"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("case", ["norm", "everything"])
def test_nothing_to_do(case, batch, frames, backend, device):
    got = run(*make(case, device=device, batch=batch, frames=frames), backend=backend)
    assert got["out"].shape == (batch, frames, 25)
    assert not any(x.any() for x in got.values())


# ------------------------------------------------------------------------------------------------ memory
@pytest.mark.parametrize("widths", [(24,), (24, 16)], ids=str)
def test_parameters_of_any_strides(widths, backend, device):
    tensors, grad = make("everything", device=device, widths=widths)
    want = run(tensors, grad, backend=backend)
    parameters = {name: poison.spread(x) for name, x in tensors.items() if name not in ("x", "residual")}
    got = run(tensors | parameters, grad, backend=backend)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("layout", poison.strided_copies(torch.zeros(1, 1, 1)))
def test_any_strides(layout, backend, device):
    """Also: nothing around the tensors is read, which is NaN."""
    tensors, grad = make("everything", device=device)
    want = run(tensors, grad, backend=backend)
    other = {name: poison.embedded(poison.permuted(x, *range(x.dim())[::-1])) for name, x in tensors.items()}
    strided = {name: poison.strided_copies(tensors[name])[layout] for name in ("x", "residual")}
    got = run(other | strided, poison.strided_copies(grad)[layout], backend=backend)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_expanded_gradient(backend, device):
    """The gradient of a sum is one element with strides 0."""
    tensors, grad = make("everything", device=device)
    ones = torch.ones_like(grad)
    want = run(tensors, ones, backend=backend)
    got = run(tensors, ones[:1, :1, :1].expand_as(grad), backend=backend)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("case", ["bias", "everything"])
def test_writes_all_of_its_outputs_and_nothing_else(case, kernel_backend, device):
    tensors = make(case, device=device)
    want = run(*tensors, backend=kernel_backend)
    with poison.nan_memory():
        got = run(*tensors, backend=kernel_backend)
    assert_same(got, want)
    with poison.guarded_allocations() as buffers:
        got = run(*tensors, backend=kernel_backend)
    assert_same(got, want)
    if kernel_backend == "triton" and case == "everything":
        assert len(buffers) >= 10


def test_saves_neither_the_normalised_input_nor_the_product(kernel_backend, device):
    tensors, _ = make("everything", device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(projection, {n: t.requires_grad_() for n, t in tensors.items()}, backend=kernel_backend)
    own = {t.data_ptr() for t in tensors.values()}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in own) == 2 * 2 * 19 * 4  # mean and deviation


# ------------------------------------------------------------------------------------------------ autograd and torch
@pytest.mark.parametrize("case", ["norm", "bare norm", "gate without bias", "everything"])
def test_gradcheck(case, backend, device):
    tensors, _ = make(case, torch.float64, device, frames=3, channels=5, widths=(2, 3))
    names = [n for n in tensors if n != "norm"]

    def function(*values):
        return call(projection, tensors | dict(zip(names, values, strict=True)), backend=backend)

    assert torch.autograd.gradcheck(
        function, [tensors[n].requires_grad_() for n in names], fast_mode=backend == "triton"
    )


def test_repeats_are_bitwise_equal(backend, device):
    interpreted = backend == "triton" and device.type == "cpu"
    case = make("everything", device=device, frames=34 if interpreted else 130)
    first = run(*case, backend=backend)
    for _ in range(4 if interpreted else 49):
        assert_same(run(*case, backend=backend), first)


def test_threads_do_not_change_the_result():
    tensors, _ = make("everything", frames=130)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call(projection, tensors, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_second_derivative_is_refused(kernel_backend, device):
    tensors, _ = make("norm", device=device)
    out = call(projection, {n: x.requires_grad_() for n, x in tensors.items()}, backend=kernel_backend)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["x", "weight1", "bias0", "scale", "shift", "residual", "gate"])
def test_only_the_gradients_asked_for(name, backend, device):
    tensors, grad = make("everything", device=device)
    want = run(tensors, grad, backend=backend)
    tensors[name].requires_grad_()
    out = call(projection, tensors, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(out, tensors[name], grad)[0], want[f"grad_{name}"])
    with torch.no_grad():
        assert not call(projection, tensors, backend=backend).requires_grad


def test_opcheck(kernel_backend, device):
    t, _ = make("everything", device=device)
    arguments = (t["x"], [t["weight0"], t["weight1"]], [t["bias0"], None], t["scale"], t["shift"], 1e-5)
    rest = (t["residual"], t["gate"])
    torch.library.opcheck(op("projection", kernel_backend), (*arguments, *rest))
    torch.library.opcheck(op("projection", kernel_backend), (*arguments[:3], None, None, None, None, None))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_opcheck_of_the_backward_pass_of_a_cpu(gated):
    t, grad = make("everything")
    weights, stats = [t["weight0"], t["weight1"]], torch.randn(2, *t["x"].shape[:2])
    gate, bias = (t["gate"], torch.randn(grad.shape[2])) if gated else (None, None)
    for normalises, wanted in (
        (True, (True, True, True)),
        (False, (False, True, False)),
        (False, (True, False, False)),
    ):
        norm = (t["scale"], None) if normalises else (None, None)
        given = (grad, grad, t["x"], stats, weights, bias, *norm, normalises, gate, *wanted)
        torch.library.opcheck(op("projection_backward", "cpu"), given)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_opcheck_of_the_passes_of_a_gpu(gated, kernel_backend, device):
    if kernel_backend == "cpu":
        pytest.skip("a CPU kernel is one pass")
    t, _ = make("everything", device=device, widths=(24,))
    normal, stats = op("norm_forward", kernel_backend)(t["x"], t["scale"], None, 1e-5)
    torch.library.opcheck(op("norm_forward", kernel_backend), (t["x"], t["scale"], None, 1e-5))
    backward = (torch.randn_like(normal), t["x"], stats, t["scale"], t["shift"], t["x"])
    torch.library.opcheck(op("norm_backward", kernel_backend), backward)
    gate, bias = (t["gate"], t["bias0"]) if gated else (None, None)
    torch.library.opcheck(op("gated_residual", kernel_backend), (t["x"], t["residual"], gate))
    products, sums = torch.randn(2, 24, 24, device=device), torch.randn(2, 24, device=device)
    torch.library.opcheck(op("gate_backward", kernel_backend), (products, sums, t["weight0"], bias, t["gate"]))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiles_in_one_graph_and_not_again_for_new_lengths(backend, device, fresh_dynamo):
    compiled = torch.compile(lambda t: call(projection, t, backend=backend), fullgraph=True, backend="aot_eager")
    for n, frames in enumerate([5, 9, 13]):
        tensors, grad = make("everything", device=device, frames=frames)
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        with torch._dynamo.config.patch(error_on_recompile=n > 1):
            out = compiled(leaves)
        got = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
        want = run(tensors, grad, backend=backend)
        torch.testing.assert_close(out.detach(), want["out"])
        for name, x in got.items():
            torch.testing.assert_close(x, want[f"grad_{name}"])


def test_activation_checkpointing(backend, device):
    tensors, grad = make("everything", device=device)
    want = run(tensors, grad, backend=backend)

    def step(values):
        return call(projection, dict(zip(tensors, values, strict=True)), backend=backend)

    leaves = [x.requires_grad_() for x in tensors.values()]
    out = checkpoint(step, leaves, use_reentrant=False)
    for name, g in zip(tensors, torch.autograd.grad(out, leaves, grad), strict=True):
        torch.testing.assert_close(g, want[f"grad_{name}"])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", ["bias", "norm", "adaptive norm", "residual", "everything"])
def test_autocast_loses_no_more_than_in_the_reference(case, dtype, backend, device):
    """From a float32 x, and from one that autocast's layers hand over; residual and gradients keep their dtype."""
    tensors, grad = make(case, device=device)
    grad = grad if "residual" in tensors else grad.to(dtype)
    for x in (tensors["x"], tensors["x"].to(dtype)):
        given = tensors | {"x": x}
        with torch.autocast(device.type, dtype):
            got, eager = (run(given, grad, backend=name) for name in (backend, "reference"))
        truth = run({n: t.double() for n, t in given.items()}, grad.double(), function=projection_ref)
        assert got["out"].dtype == grad.dtype
        got, eager = ({n: t.to(dtype) for n, t in results.items()} for results in (got, eager))  # whose rule it is
        assert_parity(got, eager, truth, case=f"autocast {case} {x.dtype}", sums=(24, grad.shape[2], 2 * 19))


def test_autocast_on_a_cpu_rounds_the_result_alone():
    """The kernel multiplies in float32 in any case, so the weights keep their digits."""
    tensors, _ = make("adaptive norm")
    want = call(projection, tensors, backend="cpu").bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(projection, tensors, backend="cpu"), want)


def test_autocast_leaves_float64(backend, device):
    tensors, grad = make("everything", torch.float64, device)
    want = run(tensors, grad, backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        assert_same(run(tensors, grad, backend=backend), want)


def test_autocast_normalises_in_float32(backend, device):
    x, weight = 1000 + torch.randn(2, 7, 16, device=device), torch.randn(8, 16, device=device)
    norm = Norm(None, None, 1e-5)
    with torch.autocast(device.type, torch.bfloat16):
        got = projection(x, [weight], [None], norm=norm, backend=backend)
    want = projection_ref(x, [weight], [None], norm=norm)
    torch.testing.assert_close(got.float() / want.abs().max(), want / want.abs().max(), rtol=0, atol=0.02)


# ------------------------------------------------------------------------------------------------ bad input
X, W, BIAS, ROW, OUT = torch.zeros(2, 5, 8), torch.zeros(6, 8), torch.zeros(6), torch.zeros(2, 6), torch.zeros(2, 5, 6)
BAD_INPUT = {
    "two dimensions": ((X[0], [W], [None]), {}, r"x must have shape \[B, T, C\].*got \[5, 8\]"),
    "integers": ((X.long(), [W], [None]), {}, "x must have .* a floating dtype, got .* torch.int64"),
    "no channels": ((X[..., :0], [W[:, :0]], [None]), {}, "C > 0"),
    "no weights": ((X, [], []), {}, "at least one; got 0 and 0"),
    "fewer biases": ((X, [W, W], [None]), {}, "as many, .* got 2 and 1"),
    "narrow weight": ((X, [W, W[:, :7]], [None] * 2), {}, r"weights\[1\] must have shape \[N, 8\], got \[6, 7\]"),
    "double weight": ((X, [W.double()], [None]), {}, r"weights\[0\] is torch.float64 on .* but x is torch.float32"),
    "short bias": ((X, [W], [BIAS[:5]]), {}, r"biases\[0\] must have shape \[6\], got \[5\]"),
    "bias elsewhere": ((X, [W], [BIAS.to("meta")]), {}, r"biases\[0\] is torch.float32 on meta"),
    "short scale": ((X, [W], [None]), {"norm": Norm(BIAS, None, 1e-5)}, r"norm.scale must have shape \[8\], got \[6\]"),
    "shift of more rows": ((X, [W], [None]), {"norm": Norm(None, torch.zeros(3, 8), 1e-5)},
                           r"norm.shift must have shape \[8\] or \[2, 8\], got \[3, 8\]"),
    "half shift": ((X, [W], [None]), {"norm": Norm(None, X[:, 0].half(), 1e-5)}, "norm.shift is torch.float16"),
    "negative eps": ((X, [W], [None]), {"norm": Norm(None, None, -1.0)}, "norm.eps must be >= 0, got -1.0"),
    "wide residual": ((X, [W], [None]), {"residual": X}, r"residual must have shape \[2, 5, 6\], got \[2, 5, 8\]"),
    "gate alone": ((X, [W], [None]), {"gate": ROW}, "gate needs a residual"),
    "gate of frames": ((X, [W], [None]), {"gate": OUT, "residual": OUT}, r"gate must have shape \[2, 6\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case, backend):
    arguments, rest, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        projection(*arguments, **rest, backend=backend)
