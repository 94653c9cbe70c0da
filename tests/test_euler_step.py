"""``euler_step`` keeps its promises on every backend."""

import contextlib
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow.ops import euler_step, euler_step_ref
from fastflow.testing import poison
from fastflow.testing.tolerances import assert_parity

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MIXED = [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]


def make(rows=2, frames=17, channels=80, dtype=torch.float32, low=None, device="cpu"):
    """x, velocity and dt."""
    x, velocity = torch.randn(rows, frames, channels), torch.randn(2 * rows, frames, channels)
    return x.to(device, dtype), velocity.to(device, low or dtype), torch.tensor(0.13, dtype=dtype, device=device)


def named(results):
    return dict(zip(("after", "doubled"), results, strict=True))


def bitwise(x, velocity, dt, rate=0.7):
    """Upstream's arithmetic, an operation at a time."""
    conditional, unconditional = velocity.chunk(2)
    return x + dt * ((1.0 + rate) * conditional - rate * unconditional)


@pytest.mark.parametrize("dtypes", [*((dtype, dtype) for dtype in DTYPES), *MIXED], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 17, 80), (1, 129, 63), (3, 2, 1000)], ids=str)
def test_matches_the_reference(size, dtypes, backend, device):
    given = make(*size, *dtypes, device=device)
    got = named(euler_step(*given, 0.7, backend=backend))
    eager = named(euler_step_ref(*given, 0.7))
    truth = named(euler_step_ref(*(tensor.double() for tensor in given), 0.7))
    assert_parity(got, eager, truth, case=f"euler_step {backend} {dtypes}")
    assert got["after"].is_contiguous()
    assert got["doubled"].is_contiguous()
    assert torch.equal(got["doubled"], got["after"].to(dtypes[1]).repeat(2, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_upstream_bitwise(dtype, backend, device):
    given = make(dtype=dtype, device=device)
    after, _ = euler_step(*given, 0.7, backend=backend)
    assert torch.equal(after, bitwise(*given))


@pytest.mark.parametrize("layout", poison.strided_copies(torch.zeros(1, 1, 1)))
def test_any_strides(layout, backend, device):
    """Also: nothing around the tensors is read (it is NaN)."""
    x, velocity, dt = make(device=device)
    want, _ = euler_step(x, velocity, dt, 0.7, backend=backend)
    strided_x, strided_velocity = (poison.strided_copies(tensor)[layout] for tensor in (x, velocity))
    for given in ((strided_x, velocity), (x, strided_velocity), (strided_x, strided_velocity)):
        after, doubled = euler_step(*given, dt, 0.7, backend=backend)
        assert torch.equal(after, want)
        assert torch.equal(doubled, want.repeat(2, 1, 1))
        assert after.is_contiguous()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), MIXED[0]], ids=str)
def test_writes_all_of_its_outputs_and_nothing_else(dtypes, kernel_backend, device):
    given = make(3, 15, 17, *dtypes, device=device)
    want = euler_step(*given, 0.7, backend=kernel_backend)
    guard = poison.guarded_allocations() if kernel_backend == "triton" else contextlib.nullcontext()
    with poison.nan_memory(), guard:
        got = euler_step(*given, 0.7, backend=kernel_backend)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_inputs_are_left_alone(backend, device):
    given = make(device=device)
    before = [tensor.clone() for tensor in given]
    euler_step(*given, 0.7, backend=backend)
    assert all(torch.equal(tensor, old) for tensor, old in zip(given, before, strict=True))


@pytest.mark.parametrize("size", [(0, 5, 3), (2, 0, 3), (2, 5, 0)], ids=str)
def test_nothing_gives_nothing(size, backend, device):
    after, doubled = euler_step(*make(*size, device=device), 0.7, backend=backend)
    assert after.shape == size
    assert doubled.shape == (2 * size[0], *size[1:])


def test_without_guidance_the_unconditional_rows_do_not_count(backend, device):
    x, velocity, dt = make(device=device)
    after, _ = euler_step(x, velocity, dt, 0.0, backend=backend)
    assert torch.equal(after, x + dt * velocity[:2])


def test_nan_stays_in_its_place(backend, device):
    x, velocity, dt = make(device=device)
    x[0, 3, 5], velocity[1, 4, 6], velocity[3, 7, 8] = (float("nan"),) * 3
    after, _ = euler_step(x, velocity, dt, 0.7, backend=backend)
    assert after.isnan().nonzero().tolist() == [[0, 3, 5], [1, 4, 6], [1, 7, 8]]


def test_a_step_from_a_table_on_the_device(backend, device):
    """What the solver does: no number is read on the host."""
    x, velocity, _ = make(device=device)
    steps = torch.tensor([0.1, 0.3, 0.6], device=device)
    for k, dt in enumerate((0.1, 0.3, 0.6)):
        want, _ = euler_step(x, velocity, torch.tensor(dt, device=device), 0.7, backend=backend)
        got, _ = euler_step(x, velocity, steps[k], 0.7, backend=backend)
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("x_dtype", "velocity_dtype"),
    [(torch.float64, torch.float32), (torch.float16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_other_pairs_of_dtypes_are_promoted_as_torch_does(x_dtype, velocity_dtype, backend, device):
    x, velocity, dt = make(dtype=x_dtype, low=velocity_dtype, device=device)
    after, doubled = euler_step(x, velocity, dt, 0.7, backend=backend)
    assert after.dtype == torch.promote_types(x_dtype, velocity_dtype)
    assert doubled.dtype == velocity_dtype
    torch.testing.assert_close(after.double(), bitwise(x.double(), velocity.double(), dt.double()), rtol=0, atol=2e-2)


def test_fifty_repeats_are_bitwise_equal(backend, device):
    given = make(device=device)
    first, _ = euler_step(*given, 0.7, backend=backend)
    assert all(torch.equal(euler_step(*given, 0.7, backend=backend)[0], first) for _ in range(49))


class OpNames(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_is_one_op(kernel_backend, device):
    given = make(device=device)
    with OpNames() as ops:
        euler_step(*given, 0.7, backend=kernel_backend)
    suffix = "_triton" if kernel_backend == "triton" else ""
    assert [name for name in ops.names if name != "aten::slice.Tensor"] == ["fastflow::euler_step" + suffix]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), MIXED[1]], ids=str)
def test_opcheck(dtypes, kernel_backend, device):
    suffix = "_triton" if kernel_backend == "triton" else ""
    op = getattr(torch.ops.fastflow, "euler_step" + suffix)
    x, velocity, dt = make(1, 5, 3, *dtypes, device=device)
    torch.library.opcheck(op, (x, velocity, dt, 0.7))
    torch.library.opcheck(op, (poison.permuted(x, 0, 2, 1), poison.permuted(velocity, 0, 2, 1), dt, 0.7))


def test_compiles_in_one_graph_and_not_again_for_new_lengths(backend, device):
    torch._dynamo.reset()
    step = functools.partial(euler_step, rate=0.7, backend=backend)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, frames in enumerate((17, 23, 5)):
        given = make(frames=frames, device=device)
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            got = compiled(*given)
        assert torch.equal(got[0], step(*given)[0])
    torch._dynamo.reset()


X, VELOCITY, DT = torch.zeros(2, 5, 3), torch.zeros(4, 5, 3), torch.zeros(())
BAD_INPUT = {
    "two dimensions": ((X[0], VELOCITY, DT), ValueError, r"x must have shape \[B, T, C\], got \[5, 3\]"),
    "integers": ((X.long(), VELOCITY, DT), TypeError, "x must be float32, .*, got torch.int64"),
    "integer velocity": ((X, VELOCITY.long(), DT), TypeError, "velocity must be float32, .*, got torch.int64"),
    "half the rows": ((X, VELOCITY[:2], DT), ValueError, r"velocity must have shape \[4, 5, 3\].*got \[2, 5, 3\]"),
    "other frames": ((X, VELOCITY[:, :4], DT), ValueError, r"velocity must have shape \[4, 5, 3\]"),
    "several steps": ((X, VELOCITY, DT.expand(2)), ValueError, r"dt must be one floating-point number.*\[2\]"),
    "integer step": ((X, VELOCITY, DT.long()), ValueError, "dt must be one floating-point number.*torch.int64"),
    "other device": ((X, VELOCITY.to("meta"), DT), ValueError, "velocity is on meta but x is on"),
    "step on another device": ((X, VELOCITY, DT.to("meta")), ValueError, "dt is on meta but x is on"),
    "gradient": ((X.clone().requires_grad_(), VELOCITY, DT), RuntimeError, "no backward pass but x requires"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case, backend, device):
    given, error, message = BAD_INPUT[case]
    given = [tensor if tensor.device.type == "meta" else tensor.to(device) for tensor in given]
    with pytest.raises(error, match=message):
        euler_step(*given, 0.7, backend=backend)
