"""The named cases.  A new one is a new entry in :data:`CASES`; names are matched by ``--only`` with * and ?."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jobs import FlowJob, OpJob
from torch import Tensor

from fastflow import config
from fastflow.ops.attention import RelativePosition, attention, attention_ref
from fastflow.ops.conv_block import conv_block, conv_block_ref
from fastflow.ops.grouped_conv import grouped_conv, grouped_conv_ref
from fastflow.ops.interpolate import interpolate, interpolate_ref
from fastflow.testing.cases import INTERPOLATE, InterpolateCase

Job = OpJob | FlowJob


@dataclass(frozen=True)
class Case:
    """A benchmark.

    Attributes:
        name: for the command line, tables and plots.
        title: what a user would call it.
        job: makes the work on a device.
        heavy: minutes on a CPU, so there it runs only when asked for by name.
        quick: part of ``--quick``.
        flow: whether it runs a whole flow.
    """

    name: str
    title: str
    job: Callable[[torch.device], Job]
    heavy: bool = False
    quick: bool = False
    flow: bool = False

    def __str__(self) -> str:
        return self.name


def _interpolate(sizes: InterpolateCase, dtype: torch.dtype, device: torch.device) -> OpJob:
    x = torch.randn(sizes.batch, sizes.tokens, sizes.channels, generator=torch.Generator().manual_seed(0))
    options = {"segments": list(sizes.segments), "channels_first": True}
    return OpJob(interpolate, interpolate_ref, {"x": x.to(device, dtype)}, options, sums=(4,))


def _attention(
    batch: int, heads: int, frames: int, chunk_size: int, relative: bool, full: bool, device: torch.device
) -> OpJob:
    """Self-attention with heads of 64, over rows of 100 %, 80 %, 60 % and 40 % of ``frames``, or full ones."""
    shapes = dict.fromkeys("qkv", (batch, heads, frames, 64))
    if relative:
        shapes |= {"position": (heads, 2 * frames - 1, 64), "bias_u": (heads, 64), "bias_v": (heads, 64)}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}
    lengths = torch.tensor([frames * (5 - row % 4) // 5 for row in range(batch)], device=device)
    options = {"lengths": None if full else lengths, "chunk_size": chunk_size, "padded_queries": relative}
    op, reference = (_relative(f) if relative else f for f in (attention, attention_ref))
    return OpJob(op, reference, tensors, options, sums=(64, frames, batch * frames))


def _relative(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The parts of the relative position as arguments of their own, so that each gets a gradient."""

    def call(position: Tensor, bias_u: Tensor, bias_v: Tensor, **arguments: Any) -> Tensor:
        return function(rel_pos=RelativePosition(position, bias_u, bias_v), **arguments)

    return call


def _conv_block(causal: bool, device: torch.device) -> OpJob:
    """A block of the U-Nets: 4 x 500 frames of 256 channels."""
    batch, frames, channels = 4, 500, 256
    shapes: dict[str, tuple[int, ...]] = {
        "x": (batch, frames, channels),
        "weight": (channels, channels, 3),
        "bias": (channels,),
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "time_bias": (batch, channels),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["weight"] /= (3 * channels) ** 0.5
    lengths = torch.full((batch,), frames, device=device)
    options = {"lengths": lengths, "groups": 0 if causal else 8, "causal": causal}
    sums = (3 * channels, channels, batch * frames, frames * channels)
    return OpJob(conv_block, conv_block_ref, {name: x.to(device) for name, x in tensors.items()}, options, sums)


def _grouped_conv(device: torch.device) -> OpJob:
    """A convolution of the position embedding of CosyVoice 3: 4 x 200 frames of 1024 channels."""
    batch, frames, channels, groups, taps = 4, 200, 1024, 16, 31
    shapes = {"x": (batch, frames, channels), "weight": (channels, channels // groups, taps), "bias": (channels,)}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    depth = taps * channels // groups
    tensors["weight"] /= depth**0.5
    given = {name: x.to(device) for name, x in tensors.items()}
    return OpJob(grouped_conv, grouped_conv_ref, given, {"groups": groups}, sums=(depth, batch * frames))


def _frames(spec: config.Spec, tokens: int) -> int:
    """Mel frames of so many tokens."""
    if "token_mel_ratio" in spec:
        return spec["token_mel_ratio"] * tokens
    return int(tokens / spec["input_frame_rate"] * 22050 / 256)


def _tokens(spec: config.Spec, rows: int, count: int) -> Tensor:
    return torch.randint(spec["vocab_size"], (rows, count), generator=torch.Generator().manual_seed(count))


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def _training(preset: str, rows: int, frames: int, device: torch.device) -> FlowJob:
    """A padded batch whose rows are 100 %, 90 %, 80 % ... of ``frames`` long."""
    spec = config.preset(preset)
    causal = "token_mel_ratio" in spec
    width = frames // spec["token_mel_ratio"] if causal else round(frames / 22050 * 256 * spec["input_frame_rate"])
    token_len = torch.tensor([width * (10 - row % 4) // 10 for row in range(rows)])
    feat_len = token_len * spec["token_mel_ratio"] if causal else (token_len * frames) // width
    batch = {
        "speech_token": _tokens(spec, rows, width),
        "speech_token_len": token_len,
        "speech_feat": _floats(rows, frames, 80),
        "speech_feat_len": feat_len,
        "embedding": _floats(rows, 192),
    }
    return FlowJob(spec, {name: x.to(device) for name, x in batch.items()}, train=True, device=device)


def _inference(preset: str, prompt: int, target: int, device: torch.device) -> FlowJob:
    """An utterance of ``target`` tokens after a prompt of ``prompt`` tokens."""
    spec = config.preset(preset)
    arguments: dict[str, Any] = {
        "token": _tokens(spec, 1, target).int(),
        "token_len": torch.tensor([target], dtype=torch.int32),
        "prompt_token": _tokens(spec, 1, prompt).int(),
        "prompt_token_len": torch.tensor([prompt], dtype=torch.int32),
        "prompt_feat": _floats(1, _frames(spec, prompt), 80),
        "prompt_feat_len": torch.tensor([_frames(spec, prompt)], dtype=torch.int32),
        "embedding": _floats(1, 192),
    }
    arguments = {name: x.to(device) for name, x in arguments.items()}
    if "token_mel_ratio" in spec:
        arguments |= {"streaming": False, "finalize": True}
    else:
        arguments["flow_cache"] = torch.zeros(1, 80, 0, 2, device=device)
    return FlowJob(spec, arguments, train=False, device=device)


def _cases() -> list[Case]:
    cases = []
    for title, sizes in INTERPOLATE.items():
        shape = f"{sizes.batch}x{sizes.tokens}-{sizes.frames}x{sizes.channels}"
        for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "-bf16")):
            cases.append(
                Case(
                    f"interpolate/{shape}{suffix}",
                    title,
                    functools.partial(_interpolate, sizes, dtype),
                    heavy=dtype == torch.bfloat16,
                    quick=sizes.batch == 1 and dtype == torch.float32,
                )
            )
    for name, title, sizes in (
        ("4x8x500", "U-Net, training batch of 500, 400, 300 and 200 frames", (4, 8, 500, 0, False, False)),
        ("4x8x500-full", "U-Net, training batch of 4 x 500 frames", (4, 8, 500, 0, False, True)),
        ("4x8x500-chunks", "the same in chunks of 50 frames", (4, 8, 500, 50, False, False)),
        ("4x8x500-relative", "encoder, training batch of 500, 400, 300 and 200 tokens", (4, 8, 500, 0, True, False)),
        ("2x16x750-full", "DiT, a solver step of 5 s prompt + 10 s utterance", (2, 16, 750, 0, False, True)),
    ):
        cases.append(Case(f"attention/{name}", title, functools.partial(_attention, *sizes)))
    for name, title in (("groups", "U-Net of CosyVoice 1"), ("causal", "U-Net of CosyVoice 2")):
        run = functools.partial(_conv_block, name == "causal")
        cases.append(Case(f"conv_block/4x500x256-{name}", f"{title}, training batch of 4 x 500 frames", run))
    title = "position embedding of CosyVoice 3, training batch of 4 x 200 frames"
    cases.append(Case("grouped_conv/4x200x1024", title, _grouped_conv))
    for version, preset in (("v1", "cosyvoice"), ("v2", "cosyvoice2"), ("v3", "cosyvoice3")):
        long_rows = [(2, 1000)] if version == "v1" else []
        for rows, frames in ((4, 200), (4, 500), (1, 1000), *long_rows):
            cases.append(
                Case(
                    f"{version}/train-{rows}x{frames}",
                    f"{preset}, training batch {rows} x {frames} frames",
                    functools.partial(_training, preset, rows, frames),
                    heavy=True,
                    flow=True,
                )
            )
        rate = config.preset(preset)["input_frame_rate"]
        for name, tokens, title in (
            ("50+100", (50, 100), "50 prompt tokens + 100 tokens"),
            ("5s+10s", (5 * rate, 10 * rate), "5 s prompt + 10 s utterance"),
        ):
            infer = functools.partial(_inference, preset, *tokens)
            cases.append(Case(f"{version}/infer-{name}", f"{preset}, {title}", infer, heavy=True, flow=True))
    for name, preset in (("tiny-v1", "tiny"), ("tiny-v2", "tiny2"), ("tiny-v3", "tiny3")):
        train = functools.partial(_training, preset, 2, 60)
        rate = config.preset(preset)["input_frame_rate"]
        infer = functools.partial(_inference, preset, rate, 2 * rate)
        quick = name == "tiny-v1"
        train_title, infer_title = "tiny flow, training batch 2 x 60 frames", "tiny flow, 1 s prompt + 2 s utterance"
        cases.append(Case(f"{name}/train-2x60", train_title, train, quick=quick, flow=True))
        cases.append(Case(f"{name}/infer-1s+2s", infer_title, infer, quick=quick, flow=True))
    return cases


CASES = {case.name: case for case in _cases()}
