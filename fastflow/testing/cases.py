"""Cases shared by tests and benchmarks."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastflow import config

ODD_SIZES = (1, 2, 15, 17, 63, 129, 1000)


class InterpolateCase(NamedTuple):
    """Shapes of one call of ``interpolate``: segments of (tokens, mel frames), equal for all rows."""

    batch: int
    channels: int
    segments: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(src_len for src_len, _ in self.segments)

    @property
    def frames(self) -> int:
        return sum(dst_len for _, dst_len in self.segments)


def inference_segments(prompt: int, tokens: int, token_rate: int = 50) -> tuple[tuple[int, int], ...]:
    """Segments of CosyVoice 1's inference: the prompt, then head, middle and tail of more than 40 tokens.

    ``token_rate`` is in tokens per second, 50 or 25; mel frames are 256 samples of 22.05 kHz.
    """

    def frames(count: int) -> int:
        return int(count / token_rate * 22050 / 256)

    head = ((prompt, frames(prompt)),) if prompt else ()
    if tokens <= 40:
        return (*head, (tokens, frames(tokens)))
    return (*head, (20, frames(20)), (tokens - 40, frames(tokens) - 2 * frames(20)), (20, frames(20)))


INTERPOLATE = {
    "training batch 8 x 500 tokens": InterpolateCase(8, 80, ((500, 860),)),
    "training batch 8 x 500 tokens, 512 channels": InterpolateCase(8, 512, ((500, 860),)),
    "training batch 4 x 290 tokens": InterpolateCase(4, 80, ((290, 500),)),
    "5 s prompt + 10 s utterance": InterpolateCase(1, 80, inference_segments(250, 500)),
    "3 s prompt + 10 s utterance, 25 Hz": InterpolateCase(1, 80, inference_segments(75, 250, 25)),
    "short utterance without prompt": InterpolateCase(1, 80, inference_segments(0, 40)),
}


def fresh_flow(name: str) -> nn.Module:
    """The flow of a preset, with the same weights in every call; it seeds torch's generator."""
    torch.manual_seed(0)
    return config.from_preset(name)


def training_batch(name: str, rows: int = 3, tokens: int = 12) -> dict[str, Tensor]:
    """A batch for the flow of a preset: each row 3 tokens shorter than the one before, token ids below 200."""
    token_len = torch.tensor([tokens - 3 * row for row in range(rows)])
    feat_len = (token_len * 1.7).int() if "token_mel_ratio" not in config.preset(name) else token_len * 2
    return {
        "speech_token": torch.randint(1, 200, (rows, tokens)),
        "speech_token_len": token_len,
        "speech_feat": torch.randn(rows, int(feat_len[0]), 80),
        "speech_feat_len": feat_len,
        "embedding": torch.randn(rows, 192),
    }
