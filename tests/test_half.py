"""float16 in the forward pass ends at +-65504, in every backend; in the backward pass it overflows to infinity."""

import math

import pytest
import torch
from torch import Tensor, nn

from fastflow.layers import Conv1d, ConvTranspose1d, Linear
from fastflow.ops import Norm
from fastflow.ops.attention import RelativePosition, attention, self_attention
from fastflow.ops.conv_block import conv_block, conv_block_ref
from fastflow.ops.dropout import dropout
from fastflow.ops.euler_step import euler_step
from fastflow.ops.feed_forward import ACTIVATIONS, feed_forward, feed_forward_ref
from fastflow.ops.half import HALF_MAX, fitted, saturated
from fastflow.ops.interpolate import interpolate
from fastflow.ops.projection import projection, projection_ref
from fastflow.ops.transformer_block import transformer_block

HALF = torch.float16
LARGE = 6e4


def normal(scale: float, *shape: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator)).clamp(-HALF_MAX, HALF_MAX).to(device, HALF)


def full(value: float, *shape: int, device: torch.device) -> Tensor:
    return torch.full(shape, value, dtype=HALF, device=device)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def assert_saturates(found: Tensor, truth: Tensor, **tolerance: float) -> None:
    """``truth`` is of float64, and reaches beyond."""
    assert found.dtype == HALF
    assert (truth.abs() > 1.1 * HALF_MAX).any()
    torch.testing.assert_close(found.double(), truth.clamp(-HALF_MAX, HALF_MAX), **(tolerance or RTOL))


RTOL = {"rtol": 1e-2, "atol": 10.0}


# ------------------------------------------------------------------------------------------------ the functions
def test_only_float16_saturates_and_nan_stays() -> None:
    x = torch.tensor([1e9, -1e9, math.inf, -math.inf, math.nan, 3.0])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        y = x.to(dtype)
        assert saturated(y) is y
        assert fitted(y, dtype) is y
    wanted = torch.tensor([HALF_MAX, -HALF_MAX, HALF_MAX, -HALF_MAX, math.nan, 3.0], dtype=HALF)
    for y in (saturated(x.to(HALF)), fitted(x, HALF).to(HALF)):
        torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_gradient_passes_through_what_saturated() -> None:
    x = torch.tensor([1.0, 1e9], requires_grad=True)
    fitted(x, HALF).backward(torch.tensor([2.0, math.inf]))
    assert x.grad.tolist() == [2.0, math.inf]


@pytest.mark.parametrize(
    "layer", [Linear(8, 6), Conv1d(8, 6, 3), ConvTranspose1d(8, 6, 4, stride=2, padding=1)], ids=str
)
def test_layers_saturate_alone_and_under_autocast(layer: nn.Module) -> None:
    """Also where float16 does not hold their input, which autocast casts."""
    torch.manual_seed(0)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    x = 1e5 * torch.randn(2, 8, 8)
    with torch.no_grad():
        truth = layer(x.clamp(-HALF_MAX, HALF_MAX))
        with torch.autocast("cpu", HALF):
            assert_saturates(layer(x), truth.double(), rtol=1e-2, atol=300.0)
        assert_saturates(layer.half()(x.clamp(-HALF_MAX, HALF_MAX).half()), truth.double(), rtol=1e-2, atol=300.0)
    layer.float()


# ------------------------------------------------------------------------------------------------ the ops
@pytest.mark.parametrize("parts", ["", "residual", "residual gate"])
def test_projection(parts: str, backend: str, device: torch.device) -> None:
    x, w, v = (normal(200, *shape, device=device) for shape in ((2, 5, 8), (6, 8), (4, 8)))
    more = {"residual": normal(1, 2, 5, 10, device=device), "gate": 1 + normal(1, 2, 10, device=device).abs()}
    more = {name: more[name] for name in parts.split()}
    truth = projection_ref(x.double(), wide(w, v), [None] * 2, **dict(zip(more, wide(*more.values()), strict=True)))
    found = projection(x, [w, v], [None] * 2, **more, backend=backend)
    assert_saturates(found, truth)


def test_the_norm_before_a_projection(backend: str, device: torch.device) -> None:
    x, w = normal(1, 2, 5, 8, device=device), normal(1, 6, 8, device=device)
    norm = Norm(full(LARGE, 8, device=device), None, 1e-5)
    truth = projection_ref(x.double(), wide(w), [None], norm=Norm(norm.scale.double(), None, 1e-5))
    found = projection(x, [w], [None], norm=norm, backend=backend)
    assert found.isfinite().all()  # the norm itself saturates where it is stored
    assert (found.sign() == truth.sign()).float().mean() > 0.9


def test_a_nan_of_the_input_stays(backend: str, device: torch.device) -> None:
    x, w = full(LARGE, 1, 2, 8, device=device), full(LARGE, 4, 8, device=device)
    x[0, 0, 3] = math.nan
    found = projection(x, [w], [None], backend=backend)
    assert found[0, 0].isnan().all()
    assert (found[0, 1] == HALF_MAX).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_feed_forward(activation: str, residual: bool, backend: str, device: torch.device) -> None:
    """Hidden channels beyond, of both signs, and a result beyond."""
    x, w1 = full(300, 2, 3, 8, device=device), full(300, 16, 8, device=device)
    w1[8:] *= -1
    w2 = full(1, 8, 16, device=device)
    w2[::2] *= -1
    rule = {"activation": activation, "residual": residual}
    truth = feed_forward_ref(x.double(), w1.double(), None, w2.double(), None, **rule)
    x.requires_grad_()
    found = feed_forward(x, w1, None, w2, None, **rule, backend=backend)
    assert_saturates(found, truth)
    found.backward(full(1 / 64, *found.shape, device=device))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_attention(relative: bool, dropout_p: float, backend: str, device: torch.device) -> None:
    """Scores beyond, and with dropout values beyond."""
    q, k = (normal(LARGE, 2, 2, 9, 16, device=device) for _ in range(2))
    v = full(LARGE, 2, 2, 9, 16, device=device)
    shapes = (2, 17, 16), (2, 16), (2, 16)
    rel_pos = RelativePosition(*(normal(LARGE, *s, device=device) for s in shapes)) if relative else None
    seed = torch.ones(1, dtype=torch.int64, device=device)
    out = attention(q, k, v, rel_pos=rel_pos, dropout_p=dropout_p, seed=seed, backend=backend)
    assert out.isfinite().all()
    assert out.max() == (HALF_MAX if dropout_p else LARGE)


def test_self_attention_with_turned_heads(backend: str, device: torch.device) -> None:
    angle = torch.rand(9, 8, device=device) * 6
    qkv = normal(LARGE, 2, 9, 3, 2, 16, device=device)
    out = self_attention(qkv, rotary=torch.stack([angle.cos(), angle.sin()]), backend=backend)
    assert out.isfinite().all()


def test_transformer_block(backend: str, device: torch.device) -> None:
    shapes = (16, 16), (16, 16), (16, 16), (16, 16), (32, 16), (16, 32)
    weights = [normal(1e4, *shape, device=device) for shape in shapes]
    norm = Norm(full(300, 16, device=device), None, 1e-5)
    x = normal(1, 2, 5, 16, device=device)
    rule = {"norms": (norm, norm), "heads": 2, "activation": "gelu", "backend": backend}
    with torch.no_grad():
        out = transformer_block(x, weights, [None] * 6, **rule)
    assert out.isfinite().all()
    assert (out.abs() == HALF_MAX).any()


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("padding", ["upstream", "exact"])
def test_conv_block(groups: int, padding: str, backend: str, device: torch.device) -> None:
    """A convolution beyond, and then a result beyond."""
    lengths = torch.tensor([9, 6], device=device)
    rule = {"lengths": lengths, "groups": groups, "padding": padding}
    small = normal(1, 2, 9, 8, device=device), normal(1, 16, 8, 3, device=device), normal(1, 16, device=device)
    scale, shift, time = (full(value, *s, device=device) for value, s in ((LARGE, (16,)), (1, (16,)), (LARGE, (2, 16))))
    large = [300 * t for t in small]
    assert conv_block(*large, scale, shift, time_bias=time, **rule, backend=backend).isfinite().all()
    truth = conv_block_ref(*wide(*small, scale, shift), time_bias=time.double(), **rule)
    found = conv_block(*small, scale, shift, time_bias=time, **rule, backend=backend)
    assert_saturates(found, truth, rtol=1e-2, atol=600.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_euler_step(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x = torch.zeros(1, 3, 4, dtype=dtype, device=device)
    velocity = torch.cat([full(LARGE, 1, 3, 4, device=device), full(-LARGE, 1, 3, 4, device=device)])
    after, doubled = euler_step(x, velocity, torch.ones((), dtype=dtype, device=device), 2.0, backend=backend)
    assert (doubled == HALF_MAX).all()
    assert (after == (HALF_MAX if dtype == HALF else 5 * LARGE)).all()


def test_dropout(backend: str, device: torch.device) -> None:
    seed = torch.ones(1, dtype=torch.int64, device=device)
    assert dropout(full(LARGE, 99, device=device), 0.5, seed=seed, backend=backend).unique().tolist() == [0, HALF_MAX]


# ------------------------------------------------------------------------------------------------ gradients
def test_gradients_overflow_to_infinity(backend: str, device: torch.device) -> None:
    """A scaler of the loss takes that as the sign that its scale is too large."""

    def gradient_of(x: Tensor, out: Tensor) -> Tensor:
        return torch.autograd.grad(out, x, full(LARGE, *out.shape, device=device))[0]

    x = full(1, 2, 8, 16, device=device).requires_grad_()
    w, b = full(1, 16, 16, device=device), normal(1, 16, device=device).requires_grad_()
    assert gradient_of(x, projection(x, [w], [None], backend=backend)).isinf().all()
    forward = feed_forward(x, w, None, w, b, activation="silu", backend=backend)
    assert gradient_of(b, forward).isinf().all()
    v = full(1, 2, 2, 1, 16, device=device).requires_grad_()
    assert gradient_of(v, attention(x.detach()[:, None].expand(2, 2, 8, 16), v, v, backend=backend)).isinf().all()
    block = conv_block(x, normal(1, 16, 16, 3, device=device), b, w[0], b, groups=2, backend=backend)
    assert gradient_of(b, block).isinf().any()
    assert gradient_of(x, interpolate(x, [(8, 64)], backend=backend)).isinf().any()
    seed = torch.ones(1, dtype=torch.int64, device=device)
    assert gradient_of(x, dropout(x, 0.5, seed=seed, backend=backend)).isinf().any()
