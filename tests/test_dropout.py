"""``dropout`` keeps its promises on every backend, and so does the mask that it shares with ``attention``."""

import math

import pytest
import torch

from fastflow.ops import dropout, dropout_ref
from fastflow.ops.dropout import dropout_mask
from fastflow.testing import poison
from fastflow.testing.tolerances import assert_parity

SEED = 0x123456789ABCDEF0 - 2**63  # both words, and the sign, count
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = [(1,), (2, 15, 63), (3, 1000), (1, 17, 129)]


# ------------------------------------------------------------------------------------------------ the mask
def test_dropout_is_philox():
    """Known answer of Random123 for philox4x32 with 7 rounds, counter 0 and key 0."""
    for word, value in enumerate([0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]):
        kept = dropout_mask(torch.tensor([0]), 1, 1, 1, 4, value / 2**32)
        dropped = dropout_mask(torch.tensor([0]), 1, 1, 1, 4, (value + 1) / 2**32)
        assert kept[0, 0, 0, word]
        assert not dropped[0, 0, 0, word]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_dropout_keeps_its_share(p):
    mask = dropout_mask(torch.tensor([SEED]), 3, 2, 70, 90, p)
    sigma = math.sqrt(p * (1 - p))
    for dims in ((), (0,), (1,), (2,), (3,)):
        rest = [d for d in range(4) if d not in dims]
        share = mask.double().mean(rest)
        count = mask.numel() / share.numel()
        assert (share - (1 - p)).abs().max() <= 5 * sigma / math.sqrt(count)


def test_dropout_differs_everywhere_and_by_seed():
    masks = [dropout_mask(torch.tensor([seed]), 2, 2, 3, 64, 0.5) for seed in (0, 1, 1 << 32, -1)]
    rows = torch.cat([mask.flatten(0, 2) for mask in masks])
    assert len(rows.unique(dim=0)) == len(rows)


def test_dropout_does_not_depend_on_the_size():
    small = dropout_mask(torch.tensor([SEED]), 1, 2, 5, 6, 0.3)
    assert torch.equal(dropout_mask(torch.tensor([SEED]), 3, 2, 9, 33, 0.3)[:1, :, :5, :6], small)


# ------------------------------------------------------------------------------------------------ the op
def seed_on(device):
    return torch.tensor([SEED], device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_the_reference(size, dtype, backend, device):
    """Also backwards: what is dropped of x is dropped of the gradient."""
    x, grad = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))

    def run(function, dtype, **where):
        given = x.detach().to(dtype).requires_grad_()
        out = function(given, 0.3, seed=seed_on(device), **where)
        out.backward(grad.to(dtype))
        return {"out": out.detach(), "grad_x": given.grad}

    got, eager, truth = run(dropout, dtype, backend=backend), run(dropout_ref, dtype), run(dropout_ref, torch.float64)
    assert_parity(got, eager, truth, case=f"dropout {backend} {dtype}")


def test_drops_what_the_mask_says(backend, device):
    x = torch.ones(2, 33, 129, device=device)
    out = dropout(x, 0.4, seed=seed_on(device), backend=backend)
    assert torch.equal(out != 0, dropout_mask(seed_on(device), 1, 1, 1, x.numel(), 0.4).view(x.shape))


def test_without_a_seed_torchs_generator_decides(backend, device):
    x = torch.ones(64, 65, device=device)

    def draw(seed):
        torch.manual_seed(seed)
        return dropout(x, 0.5, backend=backend)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert abs(float(draw(1).mean()) - 1) < 0.1


def test_keeps_nothing_for_the_backward_pass_but_the_seed(kernel_backend, device):
    saved = []
    x = torch.randn(64, 64, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        dropout(x, 0.5, backend=kernel_backend)
    assert saved == [1]


@pytest.mark.parametrize("layout", poison.strided_copies(torch.zeros(1, 1, 1)))
def test_any_strides(layout, backend, device):
    """Also: nothing around x is read (it is NaN)."""
    x = torch.randn(2, 5, 17, device=device)
    want = dropout(x, 0.3, seed=seed_on(device), backend=backend)
    strided = poison.strided_copies(x)[layout]
    assert torch.equal(dropout(strided, 0.3, seed=seed_on(device), backend=backend), want)


def test_writes_all_of_its_output(kernel_backend, device):
    x = torch.randn(3, 1031, device=device)
    want = dropout(x, 0.3, seed=seed_on(device), backend=kernel_backend)
    with poison.nan_memory():
        assert torch.equal(dropout(x, 0.3, seed=seed_on(device), backend=kernel_backend), want)


def test_is_the_same_for_any_number_of_threads(kernel_backend, device):
    x, threads = torch.randn(300_001, device=device), torch.get_num_threads()
    want = dropout(x, 0.3, seed=seed_on(device), backend=kernel_backend)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(dropout(x, 0.3, seed=seed_on(device), backend=kernel_backend), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("p", [0.0, 2**-32, 0.999])
def test_the_ends_of_p(p, backend, device):
    x = torch.randn(40, 41, device=device)
    torch.testing.assert_close(
        dropout(x, p, seed=seed_on(device), backend=backend), dropout_ref(x, p, seed=seed_on(device))
    )


def test_nothing_gives_nothing(backend, device):
    assert dropout(torch.zeros(2, 0, 3, device=device), 0.5, backend=backend).shape == (2, 0, 3)


def test_nan_that_is_kept_stays(backend, device):
    x = torch.full((100,), float("nan"), device=device)
    kept = dropout_mask(seed_on(device), 1, 1, 1, 100, 0.5).view(100)
    assert dropout(x, 0.5, seed=seed_on(device), backend=backend)[kept].isnan().all()


def test_gradcheck(backend, device):
    x = torch.randn(2, 5, 7, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.3, seed=seed_on(device), backend=backend), x)


def test_opcheck(kernel_backend, device):
    suffix = "_triton" if kernel_backend == "triton" else ""
    x = torch.randn(2, 5, 7, device=device)
    torch.library.opcheck(getattr(torch.ops.fastflow, "dropout" + suffix), (x, 0.3, seed_on(device)))


def test_compiles_in_one_graph_with_its_backward_pass(backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: dropout(x, 0.3, seed=seed_on(device), backend=backend), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(2, 5, 7, device=device, requires_grad=True)
    out = compiled(x)
    out.sum().backward()
    assert torch.equal(out, dropout(x, 0.3, seed=seed_on(device), backend=backend))
    torch._dynamo.reset()


X = torch.zeros(2, 3)
BAD_INPUT = {
    "integers": ((X.long(), 0.5), {}, "x must have a floating dtype, got torch.int64"),
    "p of 1": ((X, 1.0), {}, r"p must lie in \[0, 1\), got 1.0"),
    "negative p": ((X, -0.1), {}, r"p must lie in \[0, 1\), got -0.1"),
    "32-bit seed": ((X, 0.5), {"seed": torch.tensor([1], dtype=torch.int32)}, "seed must be one int64"),
    "two seeds": ((X, 0.5), {"seed": torch.tensor([1, 2])}, "seed must be one int64"),
    "seed elsewhere": ((X, 0.5), {"seed": torch.zeros(1, dtype=torch.int64, device="meta")}, "on meta"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case, backend, device):
    (x, p), options, message = BAD_INPUT[case]
    options = {name: t if t.device.type == "meta" else t.to(device) for name, t in options.items()}
    with pytest.raises(ValueError, match=message):
        dropout(x.to(device), p, backend=backend, **options)
