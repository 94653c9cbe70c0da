"""Mel frames and speech tokens that do not belong together: found, and put right.

A row of n tokens implies ``token_mel_ratio * n`` frames in CosyVoice 2 and 3, and ``int(n / rate * 22050 / 256)`` in
CosyVoice 1, whose length regulator stretches any n to any number of frames all the same.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastflow.checks import readable

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
