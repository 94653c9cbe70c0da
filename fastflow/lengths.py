"""Rows of a batch: padded and cleared; mel frames and speech tokens that do not belong together, found and put right.

A row of n tokens implies ``token_mel_ratio * n`` frames in CosyVoice 2 and 3, and ``int(n / rate * 22050 / 256)`` in
CosyVoice 1, whose length regulator stretches any n to any number of frames all the same.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastflow.checks import readable
from fastflow.ops.attention import length_mask

Policy = Literal["error", "trim", "interpolate"]
POLICIES: tuple[str, ...] = get_args(Policy)


def check_tolerance(frames: Tensor, implied: Tensor, tolerance: int | None) -> None:
    """Raises ValueError: a row whose frames are further than ``tolerance`` from what its tokens imply, ``[B]`` each.

    Lengths that are not on the CPU are not looked at, as that would stall the device.
    """
    if tolerance is None or not (readable(frames) and readable(implied)):
        return
    far = (frames - implied).abs() > tolerance
    if bool(far.any()):
        row = int(far.int().argmax())
        raise ValueError(
            f"row {row} of speech_feat has {int(frames[row])} frames but its tokens imply {int(implied[row])}, more "
            f"than length_tolerance {tolerance} apart: is its token rate or its hop size another one?"
        )


def resample(mel: Tensor, lengths: Tensor, targets: Tensor, frames: int) -> Tensor:
    """Each row's first ``lengths`` frames, stretched to its ``targets`` by linear interpolation.

    As ``F.interpolate(mode="linear", align_corners=False)`` on each row alone, without reading a length on the host.

    Args:
        mel: ``[B, T, C]``.
        lengths, targets: ``[B]`` frames, at least 1.
        frames: width of the result.

    Returns:
        ``[B, frames, C]``, zero past each row's target.
    """
    place = torch.arange(frames, device=mel.device)
    ratio = (lengths.double() / targets)[:, None]
    source = ((place + 0.5) * ratio - 0.5).clamp(min=0)
    last = lengths[:, None] - 1
    left = torch.minimum(source.long(), last)
    right = torch.minimum(left + 1, last)
    weight = (source - left).clamp(max=1)[..., None].to(mel.dtype)

    def take(index: Tensor) -> Tensor:
        return mel.gather(1, index[..., None].expand(-1, -1, mel.shape[2]))

    stretched = (1 - weight) * take(left) + weight * take(right)
    return stretched.masked_fill((place >= targets[:, None])[..., None], 0.0)


def _joined(name: str, rows: Sequence[Tensor], shape: str, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows of any length padded with zeros, and their lengths; ``sizes`` are those of their other dimensions."""
    if not rows:
        raise ValueError(f"{name} holds no rows")
    for n, row in enumerate(rows):
        if not isinstance(row, Tensor):
            given, inside = type(rows).__name__, type(row).__name__
            raise TypeError(f"{name} must be a tensor, got {given}, or a list of tensors, got {inside} in row {n}")
        if not row.dim() or row.shape[1:] != sizes:
            raise ValueError(f"{name} must hold tensors {shape}; got {list(row.shape)} in row {n}")
    return pad_sequence(list(rows), batch_first=True), torch.tensor([row.shape[0] for row in rows])


def joined(batch: Mapping[str, Tensor | Sequence[Tensor]], channels: int) -> dict[str, Tensor]:
    """The batch with ``speech_token`` and ``speech_feat`` (``channels`` wide) padded where they are lists of rows.

    Raises:
        ValueError, TypeError: rows that are no such tensors, or lengths beside them that are not theirs, by name.
    """
    padded = dict(batch)
    shapes = {"speech_token": ("[tokens]", ()), "speech_feat": (f"[frames, {channels}]", (channels,))}
    for name, shape in shapes.items():
        if not isinstance(rows := padded.get(name), (list, tuple)):
            continue
        padded[name], lengths = _joined(name, rows, *shape)
        given = padded.setdefault(f"{name}_len", lengths)
        if isinstance(given, Tensor) and readable(given) and given.tolist() != lengths.tolist():
            raise ValueError(f"{name}_len is {given.tolist()}, but the rows of {name} have lengths {lengths.tolist()}")
    return padded  # type: ignore[return-value]


def cleared(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with zeros in the padding of tokens and mel, whatever was there."""
    zeros = {}
    for name in ("speech_token", "speech_feat"):
        x = batch[name]
        valid = length_mask(batch[f"{name}_len"].to(x.device, non_blocking=True), x.shape[1])
        zeros[name] = x.masked_fill(~valid.view(*valid.shape, *[1] * (x.dim() - 2)), 0)
    return dict(batch) | zeros
