"""``conv_block`` keeps its promises on every backend."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastflow import backend as _backend
from fastflow.ops import conv_block, conv_block_ref
from fastflow.ops.conv_block import DTYPES
from fastflow.testing import poison
from fastflow.testing.tolerances import assert_parity

HALVES = (torch.float16, torch.bfloat16)
NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias")

# Three rows of up to 19 frames, 12 -> 24 channels; a form may say otherwise.
FORMS = {
    "CosyVoice 1": {"groups": 8},
    "CosyVoice 1, exact": {"groups": 8, "padding": "exact"},
    "CosyVoice 2": {"causal": True},
    "length regulator": {"groups": 1, "lengths": None},
    "one group, exact": {"groups": 1, "padding": "exact"},
    "causal GroupNorm": {"groups": 3, "causal": True, "eps": 1e-3},
    "causal GroupNorm, exact": {"groups": 3, "causal": True, "padding": "exact"},
    "LayerNorm": {"eps": 1e-3},
    "no time": {"groups": 4, "time": False},
    "no time, causal": {"causal": True, "time": False, "lengths": None},
}
every_form = pytest.mark.parametrize("form", FORMS)
both_norms = pytest.mark.parametrize("form", ["CosyVoice 1", "CosyVoice 2"])
main_forms = pytest.mark.parametrize("form", ["CosyVoice 1", "CosyVoice 1, exact", "CosyVoice 2"])


@pytest.fixture
def backend(backend):
    """The backends that conv_block knows."""
    if backend != "reference" and backend not in DTYPES:
        pytest.skip(f"not run: conv_block has no kernel for backend {backend}")
    return backend


@pytest.fixture
def kernel_backend(kernel_backend):
    if kernel_backend not in DTYPES:
        pytest.skip(f"not run: conv_block has no kernel for backend {kernel_backend}")
    return kernel_backend


def in_interpreter(request):
    names = {"backend", "kernel_backend"} & set(request.fixturenames)
    return _backend.triton_interprets and any(request.getfixturevalue(name) == "triton" for name in names)


@pytest.fixture
def shipped_tiles():
    """Leave the Triton kernels the tiles that they have on a GPU."""


@pytest.fixture(autouse=True)
def few_programs_in_the_interpreter(request, monkeypatch):
    """Whose time is that of the number of operations, whatever their size."""
    if not in_interpreter(request):
        return
    for form, rule in FORMS.items():
        monkeypatch.setitem(FORMS, form, {**rule, "groups": min(rule.get("groups", 0), 2)})
    if "shipped_tiles" not in request.fixturenames:
        from fastflow.kernels import conv_block as kernels

        for table in ("CONVOLVE", "WEIGHT"):
            monkeypatch.setattr(kernels, table, dict.fromkeys((2, 4), (64, 64, 64, 4, 1)))


def make(form, dtype=torch.float32, device="cpu", batch=3, frames=19, channels=12, width=24, lengths=(19, 11, 4)):
    """Tensors by name, the output's gradient, and the other arguments of a form."""
    rule = {"lengths": lengths, **(FORMS[form] if isinstance(form, str) else form)}
    if rule["lengths"] is not None:
        cut = [min(n, frames) for n in rule["lengths"][:batch]]
        rule["lengths"] = torch.tensor(cut, dtype=torch.int64, device=device)
    shapes = {"x": (batch, frames, channels), "weight": (width, channels, 3), "bias": (width,),
              "norm_weight": (width,), "norm_bias": (width,)}  # fmt: skip
    if rule.pop("time", True):
        shapes["time_bias"] = (batch, width)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors["weight"] /= math.sqrt(3 * channels)
    grad = torch.randn(batch, frames, width)
    return {n: x.to(device, dtype) for n, x in tensors.items()}, grad.to(device, dtype), rule


def call(function, tensors, rule, **kwargs):
    return function(*(tensors[name] for name in NAMES), time_bias=tensors.get("time_bias"), **rule, **kwargs)


def run(tensors, grad, rule, *, function=conv_block, **kwargs):
    """The output and the gradient of every tensor, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = call(function, leaves, rule, **kwargs)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}}


def assert_right(tensors, grad, rule, backend, case="", names=None):
    """``names``: the results to compare, all by default."""
    got = run(tensors, grad, rule, backend=backend)
    eager = run(tensors, grad, rule, function=conv_block_ref)
    truth = run({n: x.double() for n, x in tensors.items()}, grad.double(), rule, function=conv_block_ref)
    (batch, frames, channels), width = tensors["x"].shape, tensors["weight"].shape[0]
    if names is not None:
        got, eager, truth = ({name: results[name] for name in names} for results in (got, eager, truth))
    assert_parity(got, eager, truth, case=case, sums=(3 * channels, 3 * width, batch * frames))


def assert_same(got, want):
    for name in want:
        assert torch.equal(got[name], want[name]), name


@every_form
def test_matches_the_reference(form, backend, device, shipped_tiles):
    assert_right(*make(form, device=device), backend, f"conv_block {backend} {form}")


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("form", ["CosyVoice 1", "CosyVoice 1, exact", "CosyVoice 2", "length regulator"])
def test_matches_the_reference_in_every_dtype(form, dtype, backend, device, shipped_tiles):
    case = make(form, dtype, device, frames=67, lengths=(67, 40, 9))
    if dtype not in DTYPES.get(backend, (dtype,)):
        with pytest.raises(RuntimeError, match="does not support"):
            call(conv_block, *case[::2], backend=backend)
        return
    assert_right(*case, backend, f"conv_block {backend} {form} {dtype}")


@main_forms
@pytest.mark.parametrize(
    ("frames", "channels", "width"),
    [(2, 17, 64), (15, 1, 16), (17, 15, 72), (63, 63, 16), (129, 2, 40), (49, 129, 24), (97, 16, 136), (48, 320, 32)],
)
def test_odd_sizes(frames, channels, width, form, backend, device):
    lengths = frames, frames // 2 + 1
    case = make(form, device=device, batch=2, frames=frames, channels=channels, width=width, lengths=lengths)
    assert_right(*case, backend, f"conv_block {backend} {frames} x {channels} -> {width}")


@pytest.mark.parametrize("width", [1, 2, 15, 17, 63, 129])
@pytest.mark.parametrize("form", ["CosyVoice 2", "length regulator"])
def test_odd_widths(width, form, backend, device):
    """Of one or two channels LayerNorm leaves no more than a sign, and GroupNorm of one drops the bias."""
    case = make(form, device=device, frames=31, channels=17, width=width)
    names = None
    if width <= 2 and form == "CosyVoice 2":
        names = ["out", "grad_norm_bias", "grad_time_bias"]
    elif width == 1:
        names = ["out", "grad_x", "grad_weight", "grad_norm_weight", "grad_norm_bias", "grad_time_bias"]
    assert_right(*case, backend, f"conv_block {backend} -> {width}", names)


@main_forms
def test_one_frame(form, backend, device):
    case = make(form, device=device, batch=2, frames=1, width=64, lengths=(1, 1))
    assert_right(*case, backend, f"conv_block {backend} {form} one frame")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@main_forms
def test_use_cases_at_full_size(form, dtype, kernel_backend, device, full_size):
    case = make(form, dtype, device, batch=2, frames=258, channels=320, width=256, lengths=(258, 129))
    assert_right(*case, kernel_backend, f"conv_block {kernel_backend} {form} full size")


# ------------------------------------------------------------------------------------------------ meaning
@pytest.mark.parametrize("causal", [False, True])
def test_equals_upstreams_modules(causal, backend, device):
    """The formula written with PyTorch's modules, on [B, C, T] and with a mask of numbers."""
    tensors, _, rule = make("CosyVoice 2" if causal else "CosyVoice 1", device=device)
    norm = torch.nn.LayerNorm(24) if causal else torch.nn.GroupNorm(rule["groups"], 24)
    conv = torch.nn.Conv1d(12, 24, 3, padding=0 if causal else 1)
    norm, conv = norm.to(device), conv.to(device)
    tensors |= {"weight": conv.weight, "bias": conv.bias, "norm_weight": norm.weight, "norm_bias": norm.bias}
    mask = (torch.arange(19, device=device) < rule["lengths"][:, None])[:, None].float()
    x = tensors["x"].transpose(1, 2) * mask
    y = conv(F.pad(x, (2, 0)) if causal else x)
    y = norm(y.transpose(1, 2)).transpose(1, 2) if causal else norm(y)
    want = F.mish(y) * mask + tensors["time_bias"][..., None]
    torch.testing.assert_close(call(conv_block, tensors, rule, backend=backend), want.transpose(1, 2))


def test_mish_everywhere(kernel_backend, device):
    """With a constant row, norm_bias alone decides what Mish sees."""
    z = torch.cat([torch.linspace(-120, 120, 961), torch.tensor([-1e30, -1e3, 0.0, 1e3, 1e30])]).to(device)
    tensors = {"x": torch.zeros(1, 2, 1), "weight": torch.zeros(z.numel(), 1, 3)}
    tensors |= {name: torch.zeros(z.numel()) for name in NAMES[2:]}
    tensors = {name: x.to(device) for name, x in tensors.items()} | {"norm_bias": z}
    grad = torch.ones(1, 2, z.numel(), device=device)
    got = run(tensors, grad, {"groups": 1}, backend=kernel_backend)
    exact = z.double().requires_grad_()
    want = F.mish(exact)
    (slope,) = torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(got["out"][0, 0].double(), want.detach(), rtol=1e-6, atol=1e-36)
    torch.testing.assert_close(got["grad_norm_bias"].double(), 2 * slope, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@main_forms
def test_outliers(dtype, form, backend, device):
    """Also a mean that is large beside the deviation."""
    tensors, grad, rule = make(form, dtype, device)
    tensors["x"][0, 3] *= 100
    tensors["bias"] += 30
    assert_right(tensors, grad, rule, backend, f"conv_block {backend} {form} outliers {dtype}")


@pytest.mark.parametrize("form", [form for form, rule in FORMS.items() if not rule.get("groups") or "exact" in form])
def test_a_row_in_a_batch_equals_the_row_alone(form, backend, device):
    tensors, grad, rule = make(form, device=device, frames=60, lengths=(60, 53, 7))
    grad[1, 53:] = grad[2, 7:] = 0  # of the time bias
    batch = run(tensors, grad, rule, backend=backend)
    summed = {name: torch.zeros_like(batch[name]) for name in batch if name.startswith("grad_")}
    lengths = [60] * 3 if rule["lengths"] is None else rule["lengths"].tolist()
    for b, length in enumerate(lengths):
        alone = tensors | {name: tensors[name][b : b + 1] for name in ("x", "time_bias") if name in tensors}
        alone["x"] = alone["x"][:, :length]
        got = run(alone, grad[b : b + 1, :length], rule | {"lengths": None}, backend=backend)
        torch.testing.assert_close(batch["out"][b : b + 1, :length], got["out"])
        torch.testing.assert_close(batch["grad_x"][b : b + 1, :length], got["grad_x"])
        assert not batch["grad_x"][b, length:].any()
        for name in summed:
            if name != "grad_x":
                summed[name][b if name == "grad_time_bias" else slice(None)] += got[name].squeeze(0)
    for name in ("grad_weight", "grad_bias", "grad_norm_weight", "grad_norm_bias"):
        torch.testing.assert_close(batch[name], summed[name], rtol=1e-4, atol=1e-4)


@every_form
def test_rows_without_frames(form, backend, device):
    """They are the time bias, whose gradient is all they give."""
    tensors, grad, rule = make(form, device=device)
    if rule["lengths"] is None:
        pytest.skip("this form has no lengths")
    want = run({n: x[:1] if n in ("x", "time_bias") else x for n, x in tensors.items()}, grad[:1],
               rule | {"lengths": rule["lengths"][:1]}, backend=backend)  # fmt: skip
    got = run(tensors, grad, rule | {"lengths": torch.tensor([19, 0, 0], device=device)}, backend=backend)
    time = tensors["time_bias"][1:, None].expand(2, 19, 24) if "time_bias" in tensors else torch.zeros(2, 19, 24)
    assert torch.equal(got["out"][1:], time.to(device))
    assert not got["grad_x"][1:].any()
    for name in ("grad_weight", "grad_bias", "grad_norm_weight", "grad_norm_bias"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)
    if "time_bias" in tensors:
        torch.testing.assert_close(got["grad_time_bias"], grad.sum(1))


@pytest.mark.parametrize(("batch", "frames"), [(0, 5), (2, 0), (0, 0)])
@main_forms
def test_nothing_to_do(batch, frames, form, backend, device):
    got = run(*make(form, device=device, batch=batch, frames=frames), backend=backend)
    assert got["out"].shape == (batch, frames, 24)
    for name, x in got.items():
        assert not x.any(), name


# ------------------------------------------------------------------------------------------------ memory
@both_norms
def test_any_strides(form, backend, device):
    """Also: nothing around the tensors is read, which is NaN."""
    tensors, grad, rule = make(form, device=device)
    want = run(tensors, grad, rule, backend=backend)
    grads = poison.strided_copies(grad)
    for layout, x in poison.strided_copies(tensors["x"]).items():
        strided = {n: poison.embedded(poison.permuted(t, *range(t.dim())[::-1])) for n, t in tensors.items()}
        got = run(strided | {"x": x}, grads[layout], rule, backend=backend)
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=lambda m, layout=layout: f"{layout}: {m}")


def test_expanded_gradient(backend, device):
    """The gradient of a sum is one element with strides 0."""
    tensors, grad, rule = make("CosyVoice 1", device=device)
    ones = torch.ones_like(grad)
    want = run(tensors, ones, rule, backend=backend)
    assert_same(run(tensors, ones[:1, :1, :1].expand_as(grad), rule, backend=backend), want)


def test_lengths_of_any_integers(backend, device):
    tensors, grad, rule = make("CosyVoice 1", device=device)
    want = run(tensors, grad, rule, backend=backend)
    strided = torch.stack([rule["lengths"], rule["lengths"] * 0 - 5], 1)[:, 0]
    for lengths in (rule["lengths"].int(), strided):
        assert_same(run(tensors, grad, rule | {"lengths": lengths}, backend=backend), want)
    beyond, within = (torch.tensor(numbers, device=device) for numbers in ([99, -3, 7], [19, 0, 7]))
    want = run(tensors, grad, rule | {"lengths": within}, backend=backend)
    assert_same(run(tensors, grad, rule | {"lengths": beyond}, backend=backend), want)


@every_form
def test_padding_is_never_read(form, backend, device):
    tensors, grad, rule = make(form, device=device)
    if rule["lengths"] is None:
        pytest.skip("this form has no lengths")
    padding = (torch.arange(19, device=device) >= rule["lengths"][:, None])[..., None]
    want = run(tensors, grad, rule, backend=backend)
    dirty = tensors | {"x": tensors["x"].masked_fill(padding, math.nan)}
    if "time_bias" not in tensors:  # which is added there
        grad = grad.masked_fill(padding, math.nan)
    assert_same(run(dirty, grad, rule, backend=backend), want)


@every_form
def test_writes_all_of_its_outputs_and_nothing_else(form, kernel_backend, device):
    case = make(form, device=device)
    want = run(*case, backend=kernel_backend)
    guard = poison.guarded_allocations() if kernel_backend == "triton" else contextlib.nullcontext()
    with poison.nan_memory(), guard:
        got = run(*case, backend=kernel_backend)
        with torch.no_grad():
            out = call(conv_block, case[0], case[2], backend=kernel_backend)
    assert_same(got, want)
    assert torch.equal(out, want["out"])


@both_norms
def test_saves_the_convolution_and_its_statistics_only(form, kernel_backend, device):
    tensors, _, rule = make(form, device=device)
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    known = {x.data_ptr() for x in (*leaves.values(), rule["lengths"])}
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * (t.data_ptr() not in known)) or t, lambda t: t
    ):
        call(conv_block, leaves, rule, backend=kernel_backend)
    statistics = 3 * (rule.get("groups") or 19)
    assert sum(sizes) == 3 * 19 * 24 + 2 * statistics


# ------------------------------------------------------------------------------------------------ autograd and torch
@every_form
def test_gradcheck(form, backend, device):
    if torch.float64 not in DTYPES.get(backend, (torch.float64,)):
        pytest.skip(f"backend {backend} has no float64")
    rule = FORMS[form] | {"groups": min(FORMS[form].get("groups", 0), 3)}
    tensors, _, rule = make(rule, torch.float64, device, batch=2, frames=5, channels=2, width=6, lengths=(5, 2))

    def function(*values):
        return call(conv_block, dict(zip(tensors, values, strict=True)), rule, backend=backend)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors.values()])


@both_norms
def test_repeats_are_bitwise_equal(form, backend, device, request):
    case = make(form, device=device, frames=130, width=40, lengths=(130, 101, 50))
    first = run(*case, backend=backend)
    for _ in range(2 if in_interpreter(request) else 49):
        assert_same(run(*case, backend=backend), first)


@main_forms
def test_does_not_depend_on_the_number_of_threads(form, kernel_backend, device):
    if kernel_backend != "cpu":
        pytest.skip("the threads are the CPU's")
    case = make(form, device=device, frames=130, width=40, lengths=(130, 101, 50))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(*case, backend=kernel_backend))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_second_derivative_is_refused(kernel_backend, device):
    tensors, _, rule = make("CosyVoice 2", device=device)
    out = call(conv_block, {n: x.requires_grad_() for n, x in tensors.items()}, rule, backend=kernel_backend)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@both_norms
def test_only_the_gradients_asked_for(form, backend, device):
    tensors, grad, rule = make(form, device=device)
    want = run(tensors, grad, rule, backend=backend)
    for name in tensors:
        chosen = {n: x.detach().requires_grad_(n == name) for n, x in tensors.items()}
        out = call(conv_block, chosen, rule, backend=backend)
        (got,) = torch.autograd.grad(out, chosen[name], grad)
        assert torch.equal(got, want[f"grad_{name}"]), name
    with torch.no_grad():
        assert not call(conv_block, chosen, rule, backend=backend).requires_grad


@both_norms
def test_opcheck(form, kernel_backend, device):
    tensors, grad, rule = make(form, device=device, frames=5)
    numbers = (rule.get("groups", 0), rule.get("causal", False), False, 1e-5)
    parameters = (*(tensors[name] for name in NAMES), rule["lengths"])
    suffix = "_triton" if kernel_backend == "triton" else ""
    forward, backward = (getattr(torch.ops.fastflow, name + suffix) for name in ("conv_block", "conv_block_backward"))
    for save in (True, False):
        torch.library.opcheck(forward, (*parameters, tensors["time_bias"], *numbers, save))
    _, *saved = forward(*parameters, tensors["time_bias"], *numbers, True)
    for wanted in (0b111111, 0b010010):
        torch.library.opcheck(backward, (grad, *saved, *parameters, *numbers, wanted))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("form", ["CosyVoice 1, exact", "CosyVoice 2"])
def test_compiles_in_one_graph_and_not_again_for_new_lengths(form, backend, device, fresh_dynamo):
    compiled = torch.compile(lambda t, rule: call(conv_block, t, rule, backend=backend), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    for n, frames in enumerate([5, 9, 13]):
        tensors, grad, rule = make(form, device=device, frames=frames, lengths=(frames, frames // 2, 3))
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        with torch._dynamo.config.patch(error_on_recompile=n > 1):
            out = compiled(leaves, rule)
        got = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
        want = run(tensors, grad, rule, backend=backend)
        torch.testing.assert_close(out.detach(), want["out"])
        for name, x in got.items():
            torch.testing.assert_close(x, want[f"grad_{name}"])


class ConvBlock(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, x, weight, bias, norm_weight, norm_bias, lengths):
        return conv_block(x, weight, bias, norm_weight, norm_bias, lengths=lengths, groups=8, backend=self.backend)


def test_exports_as_one_node(kernel_backend, device):
    tensors, _, rule = make("CosyVoice 1", device=device)
    arguments = (*(tensors[name] for name in NAMES), rule["lengths"])
    program = torch.export.export(ConvBlock(kernel_backend), arguments)
    assert sum("fastflow" in str(node.target) for node in program.graph.nodes) == 1
    assert torch.equal(program.module()(*arguments), ConvBlock(kernel_backend)(*arguments))


def test_activation_checkpointing(backend, device):
    tensors, grad, rule = make("CosyVoice 1", device=device)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}

    def step(*values):
        return call(conv_block, dict(zip(leaves, values, strict=True)), rule, backend=backend)

    results = []
    for function in (step, lambda *values: checkpoint(step, *values, use_reentrant=False)):
        out = function(*leaves.values())
        results.append((out, *torch.autograd.grad(out, list(leaves.values()), grad)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@both_norms
def test_autocast_loses_no_more_than_in_the_reference(form, dtype, backend, device):
    """From a float32 x, and from one that autocast's layers hand over; each gradient keeps its tensor's dtype."""
    tensors, grad, rule = make(form, device=device)
    grad = grad.to(dtype)
    for x in (tensors["x"], tensors["x"].to(dtype)):
        given = tensors | {"x": x}
        with torch.autocast(device.type, dtype):
            got, eager = (run(given, grad, rule, backend=name) for name in (backend, "reference"))
        truth = run({n: t.double() for n, t in given.items()}, grad.double(), rule, function=conv_block_ref)
        assert got["out"].dtype == dtype
        got, eager = ({n: t.to(dtype) for n, t in results.items()} for results in (got, eager))  # whose rule it is
        assert_parity(got, eager, truth, case=f"autocast {form} {x.dtype}", sums=(3 * 12, 3 * 24, 3 * 19))


@both_norms
def test_autocast_on_a_cpu_rounds_the_result_alone(form):
    """The kernel multiplies in float32 in any case, so the weights keep their digits."""
    tensors, _, rule = make(form)
    want = call(conv_block, tensors, rule, backend="cpu").bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(conv_block, tensors, rule, backend="cpu"), want)


# ------------------------------------------------------------------------------------------------ bad input
X, W, V = torch.zeros(2, 10, 6), torch.zeros(8, 6, 3), torch.zeros(8)
BAD_INPUT = {
    "two dimensions": ((X[0], W, V, V, V), {}, r"x must have shape \[B, T, C >= 1\].*got \[10, 6\]"),
    "integers": ((X.long(), W, V, V, V), {}, "x must have .* a floating dtype, got .* torch.int64"),
    "no channels": ((X[..., :0], W[:, :0], V, V, V), {}, "x must have shape"),
    "channels first": ((X.transpose(1, 2), W, V, V, V), {}, r"weight must have shape \[C' >= 1, 10, 3\]"),
    "five taps": ((X, torch.zeros(8, 6, 5), V, V, V), {}, r"weight must have shape .*, got \[8, 6, 5\]"),
    "no result": ((X, W[:0], V[:0], V[:0], V[:0]), {}, "weight must have shape"),
    "short bias": ((X, W, V[1:], V, V), {}, r"bias must have shape \[8\], got \[7\]"),
    "short scale": ((X, W, V, V[1:], V), {}, "norm_weight must have shape"),
    "short shift": ((X, W, V, V, V[1:]), {}, "norm_bias must have shape"),
    "weight of another dtype": ((X, W.double(), V, V, V), {}, "weight is torch.float64 on .* but x is torch.float32"),
    "bias elsewhere": ((X, W, V.to("meta"), V, V), {}, "bias is torch.float32 on meta but x is"),
    "time of other rows": ((X, W, V, V, V), {"time_bias": V[None]}, r"time_bias must .* \[2, 8\], got \[1, 8\]"),
    "time of another dtype": ((X, W, V, V, V), {"time_bias": torch.zeros(2, 8).half()}, "time_bias is torch.float16"),
    "lengths of other rows": ((X, W, V, V, V), {"lengths": torch.zeros(3).long()}, r"shape \[2\], got \[3\]"),
    "float lengths": ((X, W, V, V, V), {"lengths": torch.zeros(2)}, "lengths must be int32 or int64 .* torch.float32"),
    "lengths elsewhere": ((X, W, V, V, V), {"lengths": torch.zeros(2, dtype=torch.int64, device="meta")},
                          "lengths is on meta"),
    "three groups": ((X, W, V, V, V), {"groups": 3}, "groups must be 0, .*, or divide the 8 channels; got 3"),
    "negative groups": ((X, W, V, V, V), {"groups": -8}, "groups must be 0"),
    "padding": ((X, W, V, V, V), {"padding": "same"}, "padding must be one of upstream, exact; got 'same'"),
}  # fmt: skip


def to_device(x, device):
    return x.to(device) if isinstance(x, torch.Tensor) and x.device.type != "meta" else x


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case, backend, device):
    tensors, rule, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        conv_block(
            *(to_device(x, device) for x in tensors),
            **{name: to_device(x, device) for name, x in rule.items()},
            backend=backend,
        )
