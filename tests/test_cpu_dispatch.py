"""The CPU kernels are compiled once per instruction set, chosen at run time; every choice gives the same numbers.

Also: the registered ops check what they are given, for those who call them without the public function.
"""

import itertools
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from fastflow import backend
from fastflow.ops.conv_block import conv_block, conv_block_ref
from fastflow.ops.grouped_conv import grouped_conv, grouped_conv_ref
from fastflow.ops.interpolate import interpolate, interpolate_ref
from fastflow.ops.projection import projection, projection_ref
from fastflow.testing.tolerances import assert_parity

if backend.extension is None:
    pytest.skip(f"not run: {backend.extension_error}", allow_module_level=True)
native = backend.extension

ALL = ("baseline", "avx2", "avx512")
SUPPORTED = native.cpu_capabilities()
UNSUPPORTED = [name for name in ALL if name not in SUPPORTED]
ROWS = torch.tensor([[[31, 70], [9, 3]], [[1, 40], [30, 30]]])


@pytest.fixture(autouse=True)
def _restore():
    yield
    native.set_cpu_capability(SUPPORTED[-1])


def run_python(code: str, capability: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "FASTFLOW_CPU_CAPABILITY": capability}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def results(function, x: torch.Tensor, segments, channels_first: bool) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = function(x, segments, 80, channels_first=channels_first)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    return {"out": out.detach(), "grad": x.grad}


@pytest.mark.parametrize("dtype", sorted(backend.FLOATS, key=str), ids=str)
@pytest.mark.parametrize("capability", SUPPORTED)
def test_every_capability_agrees_with_the_reference(capability: str, dtype: torch.dtype):
    native.set_cpu_capability(capability)
    assert native.cpu_capability() == capability
    x = torch.randn(2, 40, 67).to(dtype)

    def on_cpu(*args, **kwargs):
        return interpolate(*args, **kwargs, backend="cpu")

    for segments, channels_first in itertools.product(([(31, 70), (9, 3)], ROWS), (False, True)):
        got = results(on_cpu, x, segments, channels_first)
        want = results(interpolate_ref, x, segments, channels_first)
        if dtype == torch.float64:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
        else:
            truth = results(interpolate_ref, x.double(), segments, channels_first)
            assert_parity(got, want, truth, sums=(2, 40))


def conv_block_results(function, tensors, rule, **where) -> dict[str, torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*leaves[:-1], time_bias=leaves[-1], **rule, **where)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out.dtype)
    return {"out": out.detach(), **dict(zip("xwbsnt", torch.autograd.grad(out, leaves, grad), strict=True))}


@pytest.mark.parametrize("dtype", sorted(backend.FLOATS, key=str), ids=str)
@pytest.mark.parametrize("rule", [{"groups": 4}, {"causal": True}], ids=["GroupNorm", "LayerNorm"])
@pytest.mark.parametrize("capability", SUPPORTED)
def test_conv_block_agrees_with_the_reference_under_every_capability(capability: str, rule, dtype: torch.dtype):
    """Channels and frames that fill no vector and no tile of any."""
    native.set_cpu_capability(capability)
    rule = {"lengths": torch.tensor([67, 50]), **rule}
    shapes = (2, 67, 37), (44, 37, 3), (44,), (44,), (44,), (2, 44)
    tensors = [torch.randn(shape).div(math.sqrt(math.prod(shape[1:]))).to(dtype) for shape in shapes]
    got = conv_block_results(conv_block, tensors, rule, backend="cpu")
    want = conv_block_results(conv_block_ref, tensors, rule)
    truth = conv_block_results(conv_block_ref, [tensor.double() for tensor in tensors], rule)
    assert_parity(got, want, truth, case=f"conv_block {capability} {dtype}", sums=(3 * 37, 3 * 44, 2 * 67))


def grouped_conv_results(function, tensors, **where) -> dict[str, torch.Tensor]:
    *leaves, grad = (tensor.clone().requires_grad_() for tensor in tensors)
    out = function(*leaves, groups=3, **where)
    return {"out": out.detach(), **dict(zip("xwb", torch.autograd.grad(out, leaves, grad), strict=True))}


@pytest.mark.parametrize("dtype", sorted(backend.FLOATS, key=str), ids=str)
@pytest.mark.parametrize(("inputs", "outputs", "taps"), [(1, 1, 1), (7, 13, 9), (35, 70, 2)], ids=str)
@pytest.mark.parametrize("capability", SUPPORTED)
def test_grouped_conv_agrees_with_the_reference_under_every_capability(capability, inputs, outputs, taps, dtype):
    """Channels and frames that fill no vector and no tile of any, more frames and taps than a task has."""
    native.set_cpu_capability(capability)
    shapes = (2, 301, 3 * inputs), (3 * outputs, inputs, taps), (3 * outputs,), (2, 301, 3 * outputs)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    got = grouped_conv_results(grouped_conv, tensors, backend="cpu")
    want = grouped_conv_results(grouped_conv_ref, tensors)
    truth = grouped_conv_results(grouped_conv_ref, [tensor.double() for tensor in tensors])
    sums = inputs * taps, outputs * taps, 2 * 301
    assert_parity(got, want, truth, case=f"grouped_conv {capability} {dtype}", sums=sums)


def linear_results(function, tensors, **where) -> dict[str, torch.Tensor]:
    x, weight, bias, grad = (tensor.clone().requires_grad_() for tensor in tensors)
    out = function(x, [weight], [bias], **where)
    return {"out": out.detach(), **dict(zip("xwb", torch.autograd.grad(out, [x, weight, bias], grad), strict=True))}


@pytest.mark.parametrize("dtype", sorted(backend.FLOATS, key=str), ids=str)
@pytest.mark.parametrize(
    ("frames", "channels", "width"),
    [(17, 1, 1), (17, 600, 13), (300, 513, 31), (31, 33, 530), (577, 270, 300), (35, 40, 1024)],
    ids=["least", "many channels", "more than a task", "wide", "several tasks", "a page apart"],
)
@pytest.mark.parametrize("capability", SUPPORTED)
def test_large_products_agree_with_the_reference_under_every_capability(capability, frames, channels, width, dtype):
    """Sizes that fill no panel, and sums of more terms than are added at a time, in both gradients."""
    native.set_cpu_capability(capability)
    shapes = (1, frames, channels), (width, channels), (width,), (1, frames, width)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    got = linear_results(projection, tensors, backend="cpu")
    want = linear_results(projection_ref, tensors)
    truth = linear_results(projection_ref, [tensor.double() for tensor in tensors])
    assert_parity(got, want, truth, case=f"projection {capability} {dtype}", sums=(frames, channels, width))


def test_a_product_does_not_depend_on_the_number_of_threads():
    tensors = [torch.randn(shape) for shape in ((1, 577, 270), (300, 270), (300,), (1, 577, 300))]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(linear_results(projection, tensors, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[name], results[0][name]) for found in results for name in found)


@pytest.mark.parametrize("capability", SUPPORTED)
def test_environment_chooses_the_capability(capability: str):
    code = "from fastflow import backend; print(backend.extension.cpu_capability())"
    assert run_python(code, capability).stdout.strip() == capability


def test_best_capability_is_the_default():
    code = "from fastflow import backend; print(backend.extension.cpu_capability())"
    assert run_python(code, "").stdout.strip() == SUPPORTED[-1]


USE = """
import torch
from fastflow.ops.interpolate import interpolate
interpolate(torch.ones(1, 2, 3), [(2, 4)], backend="cpu")
"""


@pytest.mark.parametrize("name", ["sse9", "AVX2", *UNSUPPORTED])
def test_wrong_environment_is_an_error_that_names_the_choices(name: str):
    process = run_python(USE, name)
    assert process.returncode == 1, "an exception, not a signal"
    assert f"FASTFLOW_CPU_CAPABILITY must be one of {', '.join(SUPPORTED)}" in process.stderr
    assert repr(name) in process.stderr


@pytest.mark.parametrize("name", ["", "auto", *UNSUPPORTED])
def test_setting_a_wrong_capability_raises_and_changes_nothing(name: str):
    native.set_cpu_capability("baseline")
    with pytest.raises(ValueError, match=f"capability must be one of {', '.join(SUPPORTED)} on this CPU; got '{name}'"):
        native.set_cpu_capability(name)
    assert native.cpu_capability() == "baseline"


def test_baseline_runs_anywhere_and_is_always_there():
    assert SUPPORTED[0] == "baseline"
    assert set(SUPPORTED) <= set(ALL)


@pytest.mark.skipif(not UNSUPPORTED, reason="not run: this CPU runs every capability")
def test_unsupported_capability_says_that_the_cpu_is_the_reason():
    with pytest.raises(ValueError, match="which this CPU cannot run"):
        native.set_cpu_capability(UNSUPPORTED[0])


X = torch.ones(2, 5, 3)
TABLE = torch.tensor([[[5, 8]], [[2, 3]]])
NONSENSE = {
    "odd number of lengths": ((X, None, [5], 8, False), "pairs of lengths, got 1 numbers"),
    "five segments": ((X, None, [1, 1] * 5, 8, False), "at most 4 pairs of lengths, got 10 numbers"),
    "negative length": ((X, None, [-1, 8], 8, False), "lengths >= 0, got -1"),
    "beyond the input": ((X, None, [9, 8], 8, False), "put frames than the tensor: 9 where"),
    "sum beyond the output": ((X, None, [1, 4, 1, 2**62], 8, False), "put frames than the tensor: 4611686018427387904"),
    "two dimensions": ((X[0], None, [5, 5], 8, False), "dimensions"),
    "integers": ((X.long(), None, [5, 5], 8, False), "must be float32, float64, float16 or bfloat16"),
    "negative frames": ((X, None, [0, 0], -1, False), "frames must be >= 0, got -1"),
    "int32 table": ((X, TABLE.int(), [], 8, False), "rows must be int64"),
    "table of one row": ((X, TABLE[:1], [], 8, False), "rows must have shape [2, S, 2]"),
    "flat table": ((X, TABLE.view(2, 2), [], 8, False), "rows must have shape [2, S, 2]"),
    "table of five segments": ((X, TABLE.expand(2, 5, 2), [], 8, False), "rows must hold at most 4 segments, got 5"),
}


@pytest.mark.parametrize("case", NONSENSE)
@pytest.mark.parametrize("op", ["interpolate", "interpolate_backward"])
def test_registered_ops_refuse_nonsense(op: str, case: str):
    arguments, message = NONSENSE[case]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(torch.ops.fastflow, op)(*arguments)


@pytest.mark.parametrize("op", ["interpolate", "interpolate_backward"])
def test_any_number_in_a_table_is_safe(op: str):
    """Lengths in a tensor are never read by the checks, so the kernels cut them to what the tensors hold."""
    least, most = -(2**63), 2**63 - 1
    for pairs in itertools.product([(least, most), (most, least), (most, most), (3, 2), (0, 1)], repeat=2):
        out = getattr(torch.ops.fastflow, op)(X, torch.tensor([pairs, pairs[::-1]]), [], 8, False)
        assert out.shape == (2, 8, 3)
        assert out.isfinite().all()


@pytest.mark.parametrize("channels_first", [False, True], ids=["BTC", "BCT"])
@pytest.mark.parametrize("empty", range(4), ids=["no rows", "no input", "no output", "no channels"])
def test_empty_tensors_are_fine(empty: int, channels_first: bool):
    batch, tokens, frames, channels = (0 if k == empty else n for k, n in enumerate((2, 5, 8, 3)))
    lengths = [0, 0] if 0 in (tokens, frames) else [5, 8]
    out = torch.ops.fastflow.interpolate(torch.ones(batch, tokens, channels), None, lengths, frames, channels_first)
    assert out.shape == ((batch, channels, frames) if channels_first else (batch, frames, channels))
    grad = torch.ops.fastflow.interpolate_backward(torch.ones_like(out), None, lengths, tokens, channels_first)
    assert grad.shape == (batch, tokens, channels)
    assert not lengths[0] or grad.sum() == grad.shape[0] * frames * channels
