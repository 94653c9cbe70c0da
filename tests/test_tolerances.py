"""The test helpers find what they are there to find: every planted error fails."""

import math

import pytest
import torch

from fastflow.testing import poison, tolerances
from fastflow.testing.tolerances import BadTestError, assert_parity, golden_error, golden_limit

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def history(monkeypatch):
    """A history of its own, so that planted errors do not enter the summary of the run."""
    monkeypatch.setattr(tolerances, "history", [])
    return tolerances.history


def trio(dtype, noise=8.0, size=4096):
    """Truth, a reference with ``noise`` roundings of error, and its error."""
    truth = torch.randn(size, dtype=torch.float64)
    error = torch.randn(size, dtype=torch.float64) * noise * torch.finfo(dtype).eps
    eager = (truth + error).to(dtype)
    return truth, eager, eager.double() - truth


def check(got, eager, truth, **kwargs):
    assert_parity({"out": got}, {"out": eager}, {"out": truth}, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_itself_and_a_single_rounding_pass(dtype):
    truth, eager, _ = trio(dtype, noise=2.0)
    check(eager, eager, truth)
    check(truth.to(dtype), eager, truth)
    check(truth.to(dtype), truth.to(dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.2, 3.0])
def test_noise_is_gated_at_twice_the_references(dtype, factor):
    truth, eager, error = trio(dtype)
    got = (truth + factor * error).to(dtype)
    if factor < tolerances.GATE:
        check(got, eager, truth)
    else:
        with pytest.raises(AssertionError, match="largest error is"):
            check(got, eager, truth)


def test_the_rms_error_is_gated_too():
    """Every error three times the reference's usual one, but none larger than its largest."""
    truth = torch.ones(4096, dtype=torch.float64)
    error = torch.full_like(truth, 20 * torch.finfo(torch.float32).eps)
    error[0] *= 10
    with pytest.raises(AssertionError, match="rms error is"):
        check((truth + 3 * error.clamp(max=error[1])).float(), (truth + error).float(), truth)


def test_bias_fails():
    truth, eager, error = trio(torch.float32)
    with pytest.raises(AssertionError, match="error is"):
        check((truth + error + 4 * error.abs().max()).float(), eager, truth)


def test_single_outlier_fails():
    truth, eager, error = trio(torch.float32)
    got = eager.clone()
    got[17] += 4 * error.abs().max()
    with pytest.raises(AssertionError, match="largest error is"):
        check(got, eager, truth)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_result_fails(value):
    truth, eager, _ = trio(torch.float32)
    got = eager.clone()
    got[3] = value
    with pytest.raises(AssertionError, match="1 values are not finite"):
        check(got, eager, truth)


def test_missing_gradient_fails():
    truth, eager, _ = trio(torch.float32)
    with pytest.raises(AssertionError, match="grad_x: missing"):
        assert_parity({"grad_x": None}, {"grad_x": eager}, {"grad_x": truth})
    with pytest.raises(AssertionError, match="grad_x: missing"):
        assert_parity({}, {"grad_x": eager}, {"grad_x": truth})


def test_wrong_shape_or_dtype_fails():
    truth, eager, _ = trio(torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        check(eager[:, None], eager, truth)
    with pytest.raises(AssertionError, match="float64 instead of"):
        check(eager.double(), eager, truth)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda truth, eager: (truth * 0, eager * 0),
        lambda truth, eager: (truth * math.nan, eager),
        lambda truth, eager: (truth, eager * math.inf),
        lambda truth, eager: (truth, eager * 1.01),
        lambda truth, eager: (None, eager),
    ],
    ids=["all zero", "truth not finite", "reference not finite", "reference far off", "no truth"],
)
def test_a_case_that_shows_nothing_is_a_bad_test(spoil):
    truth, eager, _ = trio(torch.float32)
    got = eager.clone()
    truth, eager = spoil(truth, eager)
    with pytest.raises(BadTestError):
        check(got, eager, truth)


def test_longer_sums_widen_the_band_by_their_root():
    truth = torch.ones(8, dtype=torch.float64)
    got = truth.float() * (1 + 8 * torch.finfo(torch.float32).eps)
    check(got, truth.float(), truth, sums=(400,))
    with pytest.raises(AssertionError):
        check(got, truth.float(), truth, sums=(4,))


def test_ratio_is_recorded_even_when_it_passes(history):
    truth, eager, error = trio(torch.float32, noise=100.0)
    check((truth + 1.5 * error).float(), eager, truth, case="planted")
    assert history[0].name == "planted out"
    assert history[0].max_ratio == pytest.approx(1.5, rel=0.02)
    assert history[0].rms_ratio == pytest.approx(1.5, rel=0.02)


def test_golden_limits_are_those_of_the_design():
    assert golden_limit(torch.float32, 1e-6) == 1e-5
    assert golden_limit(torch.float32, 1e-5) == 4e-5
    assert golden_limit(torch.float32, 1e-6, gradient=True) == 1e-4
    assert golden_limit(torch.float32, 1e-4, gradient=True) == 1e-3
    assert golden_limit(torch.float64, 1e-4) == 1e-8
    assert golden_limit(torch.float64, gradient=True) == pytest.approx(1e-7)
    assert golden_limit(torch.float64, stored_float32=True) == 2e-7
    assert golden_limit(torch.float64, stored_float32=True, gradient=True) == pytest.approx(2e-6)
    assert golden_limit(torch.float64, cast=True) == 1e-6
    with pytest.raises(ValueError, match="dtype"):
        golden_limit(torch.float16)


def test_golden_error_is_relative_to_the_largest_value():
    want = torch.tensor([1.0, -4.0])
    assert golden_error(want + torch.tensor([0.0, 1.0]), want) == 0.25
    assert golden_error(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    assert golden_error(torch.tensor([math.nan, 1.0]), want) == math.inf
    assert golden_error(torch.empty(0), torch.empty(0)) == 0.0
    with pytest.raises(AssertionError, match="shape"):
        golden_error(want[:1], want)


def test_fresh_memory_holds_nan_only_inside_the_context():
    with poison.nan_memory():
        assert torch.empty(1000).isnan().all()
        assert torch.ones(3).new_empty(4, 5).isnan().all()
        assert torch.empty_like(torch.ones(7, dtype=torch.bfloat16)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("offset", [-1, 24])
def test_a_write_outside_an_output_is_found(offset):
    def write():
        with poison.guarded_allocations():
            out = torch.ones(1).new_empty((4, 6))
            out.as_strided((1,), (1,), out.storage_offset() + offset).zero_()

    with pytest.raises(AssertionError, match="outside its output"):
        write()


def test_guarded_outputs_start_as_nan_and_keep_their_shape():
    x = torch.ones(2, 3, dtype=torch.float16)
    with poison.guarded_allocations() as buffers:
        out = x.new_empty((4, 6))
        assert out.shape == (4, 6)
        assert out.dtype == x.dtype
        assert out.is_contiguous()
        assert out.isnan().all()
    assert len(buffers) == 1
    assert x.new_empty(3).numel() == 3


def test_strided_copies_are_equal_but_laid_out_differently():
    x = torch.randn(2, 5, 3)
    copies = poison.strided_copies(x)
    assert all(torch.equal(copy, x) for copy in copies.values())
    assert len({copy.stride() for copy in copies.values()}) >= 4
    assert copies["unaligned"].data_ptr() % 16
    around = copies["embedded in NaN"]
    assert around._base is not None
    assert around._base.isnan().sum() == around._base.numel() - x.numel()
