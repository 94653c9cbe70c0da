"""When two results are "the same".  The limits are in one place and nothing loosens them.

*Op parity* compares three results: the candidate's, the same-precision reference's ("eager"), and the truth, computed
in float64 from the same, already rounded inputs.  For every output and every gradient, for the largest and for the
root-mean-square error::

    error(candidate) <= 2 * error(eager) + band        band = (u(result) + u(sum) * sum_i sqrt(n_i)) * scale

where u is half the machine epsilon (one rounding), ``n_i`` the lengths of the sums the op forms, u(sum) that of
float32 (float64 for float64), and scale the largest (root mean square) value of the truth.

*Golden parity* compares with recorded numbers, relative to the largest of them: :func:`golden_limit`.
"""

import logging
import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

GATE = 2.0
TARGET = 1.25  # of the same ratio: what a kernel should reach; logged, not enforced

log = logging.getLogger(__name__)


class BadTestError(AssertionError):
    """The case measures nothing: its truth is not finite, all zero, or lost in the reference's own error."""


class Parity(NamedTuple):
    """One comparison: each ratio is (error(candidate) - band) / error(eager), and 0 within the band."""

    name: str
    max_ratio: float
    rms_ratio: float


history: list[Parity] = []  # all comparisons of this process, for a summary


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _max(x: Tensor) -> float:
    return x.abs().max().item()


def _ratio(error: float, eager_error: float, band: float) -> float:
    if error <= band:
        return 0.0
    return (error - band) / eager_error if eager_error else math.inf


def _compare(name: str, got: Tensor | None, eager: Tensor | None, truth: Tensor | None, sums: Collection[int]) -> None:
    if eager is None or truth is None:
        raise BadTestError(f"{name}: the reference has none")
    assert got is not None, f"{name}: missing"
    assert got.shape == truth.shape, f"{name}: shape {list(got.shape)} instead of {list(truth.shape)}"
    assert got.dtype == eager.dtype, f"{name}: {got.dtype} instead of {eager.dtype}"
    dtype = got.dtype
    got, eager, truth = (x.detach().to(truth.device, torch.float64) for x in (got, eager, truth))
    if not (truth.isfinite().all() and eager.isfinite().all()):
        raise BadTestError(f"{name}: the reference is not finite")
    if not truth.any():
        raise BadTestError(f"{name}: the reference is zero everywhere")
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum().item()} values are not finite"

    unit = torch.finfo(dtype).eps / 2
    sum_unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    relative_band = unit + sum_unit * sum(math.sqrt(n) for n in sums)
    if _max(eager - truth) > math.sqrt(2 * unit) * _max(truth):
        raise BadTestError(f"{name}: ill-posed, the reference itself lost half its digits: {_max(eager - truth):.3g}")
    ratios = (_ratio(norm(got - truth), norm(eager - truth), relative_band * norm(truth)) for norm in (_max, _rms))
    parity = Parity(name, *ratios)
    history.append(parity)
    log.info("%s: %.2f x the reference's largest error, %.2f x its rms error (target %.2f)", *parity, TARGET)
    assert parity.max_ratio <= GATE, f"{name}: largest error is {parity.max_ratio:.2f} x the reference's"
    assert parity.rms_ratio <= GATE, f"{name}: rms error is {parity.rms_ratio:.2f} x the reference's"


def assert_parity(
    got: Mapping[str, Tensor | None],
    eager: Mapping[str, Tensor | None],
    truth: Mapping[str, Tensor | None],
    *,
    case: str = "",
    sums: Collection[int] = (),
) -> None:
    """Assert the op-parity rule above for each named result.

    Args:
        got: the candidate's outputs and gradients by name.
        eager: the reference's, in the same precision; its names are the ones compared.
        truth: the reference's in float64, from the same inputs.
        case: a prefix for messages.
        sums: lengths of the sums that the op forms.

    Raises:
        AssertionError: a result is missing, not finite, misshapen, or off by more than the rule allows.
        BadTestError: the case cannot show an error.
    """
    for name in eager:
        _compare(f"{case} {name}".strip(), got.get(name), eager[name], truth.get(name), sums)


def golden_limit(
    dtype: torch.dtype, noise: float = 0.0, *, gradient: bool = False, stored_float32: bool = False, cast: bool = False
) -> float:
    """Largest allowed error of a result in ``dtype`` against recorded numbers, relative to the largest of these.

    Args:
        dtype: float32 or float64, in which the candidate ran.
        noise: recorded error of upstream's own float32 run, in the same units.
        gradient: whether it is a gradient.
        stored_float32: whether the record was rounded to float32.
        cast: whether the candidate rounded a float64 result to float32, as upstream's solver does.
    """
    if dtype == torch.float32:
        return max(10 * noise, 1e-4) if gradient else max(4 * noise, 1e-5)
    if dtype == torch.float64:
        limit = (2e-7 if stored_float32 else 1e-8) * (10 if gradient else 1)
        return max(limit, 1e-6) if cast else limit
    raise ValueError(f"dtype must be float32 or float64, got {dtype}")


def golden_error(got: Tensor, want: Tensor) -> float:
    """max|got - want| / max|want| in float64; infinite if ``got`` is not finite; max|got| if ``want`` is all zero."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape, f"shape {list(got.shape)} instead of {list(want.shape)}"
    if not got.isfinite().all():
        return math.inf
    if not want.numel():
        return 0.0
    return _max(got - want) / (_max(want) or 1.0)
