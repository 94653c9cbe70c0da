"""Linear resampling of consecutive segments of a sequence: the length regulator's interpolation in one launch.

A row of x is cut into up to four consecutive segments of ``s_k`` input frames, and segment k is stretched to ``d_k``
output frames.  With ``I = s_k`` and ``O = d_k``, output frame j of the segment is, as in
``torch.nn.functional.interpolate(mode="linear", align_corners=False)``::

    src = max((j + 0.5) * (I / O) - 0.5, 0)
    i0 = min(floor(src), I - 1)      i1 = min(i0 + 1, I - 1)      w = src - i0
    out[j] = (1 - w) * x[i0] + w * x[i1]

computed in float32 (float64 for float64 input); ``(j + 0.5) * (I / O) - 0.5`` is rounded once, after an IEEE division
for the ratio, since PyTorch's kernels use a fused multiply-add there (AVX2, AVX-512 and CUDA).  Output frames past the
last segment of a row are zero.

The backward pass gathers: the gradient of input frame i sums the weights of the output frames that read i, so it is
deterministic and needs no atomics.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastflow import backend as _backend
from fastflow.ops.half import widened
from fastflow.ops.registry import define, kernel, op

MAX_SEGMENTS = 4  # prompt, head, middle, tail
DTYPES = dict.fromkeys(("cpu", "cuda", "triton"), _backend.FLOATS)

Segments = Sequence[tuple[int, int]] | Tensor
Length = (int, torch.SymInt)  # a SymInt while a graph of dynamic lengths is traced

# `rows` [B, S, 2] int64 gives each row its own segments; otherwise `shared` (s_0, d_0, s_1, d_1, ...) holds for all.
_FORWARD = "(Tensor x, Tensor? rows, SymInt[] shared, SymInt frames, bool channels_first) -> Tensor"
_BACKWARD = "(Tensor grad, Tensor? rows, SymInt[] shared, SymInt in_frames, bool channels_first) -> Tensor"


def _forward_fake(x: Tensor, rows: Tensor | None, shared: Sequence[int], frames: int, channels_first: bool) -> Tensor:
    batch, _, channels = x.shape
    return x.new_empty((batch, channels, frames) if channels_first else (batch, frames, channels))


def _backward_fake(
    grad: Tensor, rows: Tensor | None, shared: Sequence[int], in_frames: int, channels_first: bool
) -> Tensor:
    return grad.new_empty((grad.shape[0], in_frames, grad.shape[1 if channels_first else 2]))


define("interpolate", _FORWARD, _forward_fake, kernel("interpolate", "interpolate_forward"))
define("interpolate_backward", _BACKWARD, _backward_fake, kernel("interpolate", "interpolate_backward"))


class InterpolateFunction(torch.autograd.Function):
    """Saves no activation: the backward pass needs the segments only."""

    @staticmethod
    def forward(ctx, x, rows, shared, frames, channels_first, backend):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows)
        ctx.rest, ctx.backend = (shared, x.shape[1], channels_first), backend
        return op("interpolate", backend)(x, rows, shared, frames, channels_first)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (rows,) = ctx.saved_tensors
        given = widened(grad) if ctx.backend == "cpu" else grad
        grad_x = op("interpolate_backward", ctx.backend)(given, rows, *ctx.rest)
        return grad_x.to(grad.dtype), None, None, None, None, None


def _source(src_len: Tensor, dst_len: Tensor, j: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Indices i0, i1 and weight w of output frame j, by the formula above."""
    ratio = src_len.to(dtype) / dst_len.to(dtype)
    # In float64 the product of two float32 is exact, so float32 positions are rounded once.
    src = ((j.double() + 0.5) * ratio.double() - 0.5).to(dtype).clamp(min=0)
    i0 = src.floor().long().minimum(src_len - 1)
    return i0, (i0 + 1).minimum(src_len - 1), src - i0


def _interpolate_rows(x: Tensor, rows: Tensor, frames: int) -> Tensor:
    """Segments that differ between rows: gather and blend, [B, T, C] -> [B, frames, C]."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, in_frames = rows.to(x.device), x.shape[1]
    if in_frames == 0:
        x = F.pad(x, (0, 0, 0, 1))  # a frame to gather from, which no segment reaches
    start = torch.zeros_like(rows[:, 0])  # first input and output frame of the segment
    j = torch.arange(frames, device=x.device).expand(x.shape[0], frames)
    out = x.new_zeros((x.shape[0], frames, x.shape[2]), dtype=wide)
    for k in range(rows.shape[1]):
        src_len = rows[:, k, 0].clamp(min=0).minimum(in_frames - start[:, 0])
        dst_len = rows[:, k, 1].clamp(min=0)
        local = j - start[:, 1:]
        inside = (local >= 0) & (local < dst_len[:, None]) & (src_len[:, None] > 0)
        i0, i1, w = _source(src_len[:, None], dst_len[:, None].clamp(min=1), local.clamp(min=0), wide)
        first, last = start[:, :1], max(in_frames - 1, 0)
        left, right = (
            x.gather(1, (first + i).clamp(0, last)[..., None].expand(-1, -1, x.shape[2])).to(wide) for i in (i0, i1)
        )
        w = w[..., None]
        out = torch.where(inside[..., None], (1 - w) * left + w * right, out)
        start = start + torch.stack([src_len, dst_len], 1)
    return out.to(x.dtype)


def _interpolate_shared(x: Tensor, segments: Sequence[tuple[int, int]], frames: int) -> Tensor:
    """Segments that hold for all rows, by F.interpolate: [B, T, C] -> [B, C, frames]."""
    parts, src_start, filled = [], 0, 0
    for src_len, dst_len in segments:
        if src_len and dst_len and x.shape[2]:
            part = x[:, src_start : src_start + src_len].transpose(1, 2).contiguous()
            parts.append(F.interpolate(part, size=dst_len, mode="linear"))
            filled += dst_len
        src_start += src_len
    if filled < frames or not parts:
        parts.append(F.pad(x[:, :0].transpose(1, 2), (0, frames - filled)))  # zeros
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def interpolate_ref(
    x: Tensor, segments: Segments, frames: int | None = None, *, channels_first: bool = False
) -> Tensor:
    """The same as :func:`interpolate` in plain PyTorch; shared segments go through ``F.interpolate`` itself."""
    total = _output_frames(segments, frames)
    with _backend.no_autocast(x):
        if isinstance(segments, Tensor):
            out = _interpolate_rows(x, segments, total).transpose(1, 2)
        else:
            out = _interpolate_shared(x, segments, total)
    return (out if channels_first else out.transpose(1, 2)).contiguous()


def _output_frames(segments: Segments, frames: int | None) -> int:
    if frames is not None:
        return frames
    if isinstance(segments, Tensor):
        raise ValueError("frames must be given when segments is a tensor: its values are never read on the host")
    return sum(dst_len for _, dst_len in segments)


def _is_pair(pair: Sequence[int]) -> bool:
    return len(pair) == 2 and isinstance(pair[0], Length) and isinstance(pair[1], Length)


def _check(x: Tensor, segments: Segments, frames: int | None) -> int:
    """Validate the arguments without reading device memory and return the number of output frames."""
    if x.dim() != 3:
        raise ValueError(f"x must have shape [B, T, C], got {list(x.shape)}")
    if x.dtype not in _backend.FLOATS:
        raise TypeError(f"x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if not isinstance(segments, Tensor) and not all(_is_pair(pair) for pair in segments):
        raise TypeError(f"segments must hold pairs of ints, got {list(segments)}")
    total = _output_frames(segments, frames)
    if isinstance(segments, Tensor):
        if segments.dim() != 3 or segments.shape[0] != x.shape[0] or segments.shape[2] != 2:
            raise ValueError(f"segments must have shape [{x.shape[0]}, S, 2], got {list(segments.shape)}")
        if segments.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"segments must be int32 or int64, got {segments.dtype}")
        if segments.device != x.device:
            raise ValueError(f"segments is on {segments.device} but x is on {x.device}")
        count = segments.shape[1]
    else:
        count = len(segments)
        used = sum(src_len for src_len, _ in segments)
        if any(src_len < 0 or dst_len < 0 for src_len, dst_len in segments):
            raise ValueError(f"segments must hold lengths >= 0, got {list(segments)}")
        if any(dst_len > 0 and src_len == 0 for src_len, dst_len in segments):
            raise ValueError(f"segments: an empty input cannot fill output frames, got {list(segments)}")
        if used > x.shape[1]:
            raise ValueError(f"segments use {used} input frames, but x has {x.shape[1]}")
        if total < (filled := sum(dst_len for _, dst_len in segments)):
            raise ValueError(f"segments fill {filled} output frames, but frames is {total}")
    if not 1 <= count <= MAX_SEGMENTS:
        raise ValueError(f"segments must hold 1 to {MAX_SEGMENTS} segments, got {count}")
    if total < 0:
        raise ValueError(f"frames must be >= 0, got {total}")
    return total


def interpolate(
    x: Tensor,
    segments: Segments,
    frames: int | None = None,
    *,
    channels_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Resample consecutive segments of every row of ``x`` linearly (formula at the top of this file).

    Args:
        x: ``[B, T, C]``, float32, float64, float16 or bfloat16, any strides.
        segments: up to four pairs (input frames, output frames), one after the other in input and output.  A list of
            pairs of ints holds for every row; an int32 or int64 tensor ``[B, S, 2]`` on the device of ``x`` gives each
            row its own.  Lengths in a tensor are never read on the host: what reaches beyond ``T`` or ``frames`` is
            cut off, and a segment without input yields zeros.
        frames: width of the output; at least the sum of the output frames, which is the default for a list, and
            required for a tensor.  Frames past a row's last segment are zero.
        channels_first: return ``[B, C, frames]``, as a convolution wants it, instead of ``[B, frames, C]``.
        backend: ``auto`` (None takes the one in force), ``reference``, ``cpu``, ``cuda`` or ``triton``.

    Returns:
        A contiguous tensor of the dtype of ``x``.  float16 and bfloat16 are blended in float32 and rounded once.

    Raises:
        ValueError, TypeError: arguments that do not fit, by name.
        RuntimeError: the chosen backend cannot run here, with the reason.
    """
    total = _check(x, segments, frames)
    chosen = _backend.select("interpolate", x, DTYPES, backend)
    if chosen == "reference":
        return interpolate_ref(x, segments, total, channels_first=channels_first)
    if isinstance(segments, Tensor):
        rows, shared = segments.long(), []
    else:
        rows, shared = None, [length for pair in segments for length in pair]
    if torch.is_grad_enabled() and x.requires_grad:
        return InterpolateFunction.apply(x, rows, shared, total, channels_first, chosen)
    return op("interpolate", chosen)(x, rows, shared, total, channels_first)
