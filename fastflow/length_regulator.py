"""The length regulator of CosyVoice 1: encoder frames at the token rate become mel frames."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fastflow.layers import plain
from fastflow.ops.attention import length_mask
from fastflow.ops.conv_block import conv_block
from fastflow.ops.interpolate import interpolate
from fastflow.ops.projection import projection
from fastflow.padding import Padded
from fastflow.recompute import Recomputing

EDGE_TOKENS = 20  # the runtime's chunks overlap by this many tokens, so both ends must map to a fixed mel length


MEL_RATE = 22050 / 256  # frames per second


def mel_frames(tokens: int, frame_rate: float) -> int:
    """Mel frames (22.05 kHz, hop 256) of ``tokens`` at ``frame_rate`` per second; upstream's order of operations."""
    return int(tokens / frame_rate * 22050 / 256)


def implied_frames(tokens: Tensor, frame_rate: float) -> Tensor:
    """:func:`mel_frames` of every entry, int64."""
    return (tokens.double() / frame_rate * 22050 / 256).long()


class InterpolateRegulator(Recomputing, Padded):
    """Linear resampling, then for every sampling ratio a convolution, GroupNorm and Mish, then a projection.

    Only the number of ``sampling_ratios`` matters, as upstream.
    """

    def __init__(
        self, channels: int, sampling_ratios: tuple[int, ...], out_channels: int | None = None, groups: int = 1
    ) -> None:
        super().__init__()
        self.sampling_ratios = sampling_ratios
        model: list[nn.Module] = []
        for _ in sampling_ratios:
            model += [nn.Conv1d(channels, channels, 3, padding=1), nn.GroupNorm(groups, channels), nn.Mish()]
        self.model = nn.Sequential(*model, nn.Conv1d(channels, out_channels or channels, 1))

    def forward(
        self, x: Tensor, ylens: Tensor, frames: int | None = None, xlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Training: stretch the whole padded row to the longest target, or (exact) each row's tokens to its own.

        Args:
            x: ``[B, T, channels]``; padded positions take part, as upstream, except with ``padding = "exact"``.
            ylens: ``[B]`` mel frames of each row.
            frames: ``max(ylens)`` if it is known, which saves reading ``ylens`` from the device.
            xlens: ``[B]`` tokens of each row, which ``padding = "exact"`` needs and nothing else reads.

        Returns:
            ``[B, frames, out_channels]``, zero past each row's length, and ``ylens``.

        Raises:
            ValueError: ``padding`` is ``"exact"`` and xlens is None.
        """
        if frames is None:
            frames = int(ylens.max())
        if not self.exact:
            y = self._convolve(interpolate(x, [(x.shape[1], frames)], frames))
        elif xlens is None:
            raise ValueError("padding 'exact' needs xlens, the tokens of each row")
        else:
            rows = torch.stack([xlens.to(ylens), ylens], 1)[:, None].long()
            y = self._convolve(interpolate(x, rows, frames), ylens)
        return y * length_mask(ylens, frames)[..., None], ylens

    def inference(
        self, x1: Tensor, x2: Tensor, mel_len1: int, mel_len2: int, input_frame_rate: int = 50
    ) -> tuple[Tensor, int]:
        """Stretch prompt and target apart; of a target over 40 tokens, the first and last 20 apart from the middle.

        Args:
            x1: ``[1, P, channels]`` prompt; P may be 0.
            x2: ``[1, N, channels]`` target.
            mel_len1, mel_len2: mel frames of prompt and target.
            input_frame_rate: tokens per second, which decides the frames of 20 tokens.

        Returns:
            ``[1, mel_len1 + mel_len2, out_channels]`` and that number of frames.
        """
        segments = [(x1.shape[1], mel_len1)] if x1.shape[1] else []
        if (tokens := x2.shape[1]) > 2 * EDGE_TOKENS:
            edge = mel_frames(EDGE_TOKENS, input_frame_rate)
            middle = tokens - 2 * EDGE_TOKENS, mel_len2 - 2 * edge
            segments += [(EDGE_TOKENS, edge), middle, (EDGE_TOKENS, edge)]
        else:
            segments += [(tokens, mel_len2)]
        frames = mel_len1 + mel_len2
        return self._convolve(interpolate(torch.cat([x1, x2], 1), segments, frames)), frames

    def _convolve(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``[B, T, channels]`` -> ``[B, T, out_channels]``; with lengths, frames past them do not take part."""
        layers: Any = self.model
        *blocks, last = layers
        for conv, norm in zip(blocks[::3], blocks[1::3], strict=True):
            parameters = plain(conv, nn.Conv1d).weight, conv.bias, norm.weight, norm.bias
            keep = self.recompute in ("auto", "none")
            rule: dict[str, Any] = {"groups": norm.num_groups, "eps": norm.eps, "keep_product": keep}
            x = conv_block(x, *parameters, lengths=lengths, padding=self.padding, **rule)
        return projection(x, [plain(last, nn.Conv1d).weight[:, :, 0]], [last.bias])
