"""Loss curves of training: fastflow's kernels against its reference, and against CosyVoice where that can be imported.

All runs of a version start from the same weights and see the same batches, the same optimizer and, seeded alike at
every step, the same random numbers in upstream's order.  There is no dropout, whose draws are each one's own.  What
differs is rounding, so in float32 the curves lie on each other, and under bfloat16 autocast they leave the float32
curve by what bfloat16 itself costs.  How far is a matter of chance, which differs by half and more from one draw of
weights, batches and random numbers to the next, so there are several.  The time is drawn in float32 there too, where
training may draw it in bfloat16: it would be another time, and that alone would move the curve further than all
rounding.

Writes ``training-parity-<date>.json`` and a picture beside the other results.
"""

import argparse
import copy
import datetime
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).parent))

import upstream
from jobs import seed
from machine import describe

from fastflow import config, use_backend
from fastflow.config import Spec

STEPS, DRAWS = 50, 8
LR = 1e-3
PRESETS = {"v1": "tiny", "v2": "tiny2", "v3": "tiny3"}
PROVIDERS = ("reference", "auto", "cosyvoice")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
TOKENS = ((13, 9, 4), (12, 12, 3), (10, 11, 8), (13, 5, 7))  # lengths of the rows of each batch

Curve = list[float]
Batch = Mapping[str, Tensor]


def spec_of(version: str, upstreams_width: bool = False) -> Spec:
    """A small flow without dropout, with chunks that a short row has several of.

    ``upstreams_width``: the encoder of v2 is 512 wide, as upstream's can only be.
    """
    spec = config.preset(PRESETS[version])
    spec["vocab_size"] = 64
    estimator = spec["decoder"]["estimator"]
    estimator |= {"dim": 64, "depth": 2, "heads": 2} if version == "v3" else {"num_mid_blocks": 1}
    if version != "v1":
        estimator["static_chunk_size"] = 8
    if version == "v2":
        spec["encoder"]["static_chunk_size"] = 4
        if upstreams_width:
            spec["input_size"] = 512
            spec["encoder"] |= {"input_size": 512, "output_size": 512, "attention_heads": 8}
    return spec


def batches_of(spec: Spec, draw: int = 0) -> list[dict[str, Tensor]]:
    """Padded batches of three uneven rows, with random tokens and mel of unit variance."""
    generator, ratio = torch.Generator().manual_seed(draw), spec.get("token_mel_ratio", 22050 / 256 / 50)
    batches = []
    for lengths in TOKENS:
        token_len = torch.tensor(lengths)
        feat_len = (token_len * ratio).int()
        rows, tokens, frames = len(lengths), max(lengths), int(feat_len.max())
        batches.append(
            {
                "speech_token": torch.randint(spec["vocab_size"], (rows, tokens), generator=generator),
                "speech_token_len": token_len.int(),
                "speech_feat": torch.randn(rows, frames, 80, generator=generator),
                "speech_feat_len": feat_len,
                "embedding": torch.randn(rows, 192, generator=generator),
            }
        )
    return batches


class _TimeInFloat32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        return func(*args, **(kwargs | {"dtype": torch.float32} if func is torch.rand else kwargs))


def curve(
    flow: nn.Module,
    batches: Sequence[Batch],
    steps: int,
    *,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    draw: int = 0,
) -> Curve:
    """Train by Adam and return the loss of every step; ``dtype``: of autocast."""
    from tqdm import trange

    flow.train()
    optimizer = torch.optim.Adam(flow.parameters(), lr=LR)
    losses = []
    with use_backend(backend):
        for step in trange(steps, desc=f"{backend} {dtype or 'float32'}", leave=False, disable=None):
            seed(draw * steps + step)
            # Around one forward pass only, for autocast remembers the weights it has cast until it ends.
            with _TimeInFloat32(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = flow(batches[step % len(batches)], torch.device("cpu"))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def largest(got: Curve, want: Curve) -> float:
    """Largest relative difference of any step's loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))


def rms(got: Curve, want: Curve) -> float:
    """Root mean square over the steps of the loss's relative difference."""
    return math.sqrt(sum(((a - b) / b) ** 2 for a, b in zip(got, want, strict=True)) / len(want))


def curves_of(
    version: str, steps: int, providers: Sequence[str], precisions: Sequence[str] = tuple(PRECISIONS), draw: int = 0
) -> dict[str, Curve]:
    """``{"<provider> <precision>": losses}``, all from the weights, batches and random numbers of one draw."""
    with_upstream = "cosyvoice" in providers
    spec = spec_of(version, upstreams_width=with_upstream)
    theirs = upstream.build(spec) if with_upstream else None
    seed(draw)
    flow, batches, curves = config.build(spec), batches_of(spec, draw), {}
    for precision in precisions:
        for provider in providers:
            start = copy.deepcopy(theirs if provider == "cosyvoice" else flow)
            start.load_state_dict(flow.state_dict())
            backend = "auto" if provider == "auto" else "reference"
            curves[f"{provider} {precision}"] = curve(
                start, batches, steps, backend=backend, dtype=PRECISIONS[precision], draw=draw
            )
    return curves


def distances(curves: Mapping[str, Curve]) -> dict[str, float]:
    """Of float32 the largest relative difference to the reference, of bfloat16 the rms one to the float32 reference."""
    truth = curves["reference float32"]
    return {
        name: (largest if name.endswith("float32") else rms)(losses, truth)
        for name, losses in curves.items()
        if losses is not truth
    }


def summary(draws: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Median, smallest and largest of each of the :func:`distances` over the draws."""
    found: dict[str, dict[str, float]] = {}
    for name in draws[0]:
        values = [apart[name] for apart in draws]
        found[name] = {"median": statistics.median(values), "smallest": min(values), "largest": max(values)}
    return found


def rms_by_step(draws: Sequence[Mapping[str, Curve]], name: str) -> list[float]:
    """How far a run is from the float32 reference at each step, as root mean square over the draws."""
    runs, truths = ([found[key] for found in draws] for key in (name, "reference float32"))
    return [rms(got, want) for got, want in zip(zip(*runs, strict=True), zip(*truths, strict=True), strict=True)]


def draw_picture(path: Path, curves: Mapping[str, Sequence[Mapping[str, Curve]]]) -> None:
    """Losses of the first draw above, and below how far every run is from the float32 reference over all draws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), dpi=110, layout="constrained")
    top, bottom = figure.subplots(2, len(curves), sharex=True, squeeze=False)
    colours = dict(zip(PROVIDERS, ("tab:gray", "tab:blue", "tab:red"), strict=True))
    for over, under, (version, draws) in zip(top, bottom, curves.items(), strict=True):
        for name, losses in draws[0].items():
            provider, precision = name.split()
            style = {"color": colours[provider], "linestyle": "-" if precision == "float32" else ":", "label": name}
            over.plot(losses, linewidth=1.2, **style)
            if name != "reference float32":
                under.semilogy([max(x, 1e-9) for x in rms_by_step(draws, name)], linewidth=1.2, **style)
        under.axhline(1e-4, color="black", linewidth=0.8, linestyle="--")
        over.set_title(version)
        under.set_xlabel("step")
        over.grid(alpha=0.3)
        under.grid(alpha=0.3)
    top[0].set_ylabel("loss")
    bottom[0].set_ylabel("rms distance from reference float32")
    top[-1].legend(frameon=False, fontsize=8)
    bottom[-1].annotate("1e-4", (0, 1e-4), (0, 2), textcoords="offset points", fontsize=8)
    figure.savefig(path)


def table(summaries: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown: :func:`summary` of every version."""
    names = list(next(iter(summaries.values())))
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for version, found in summaries.items():
        cells = [f"{x['median']:.2g} ({x['smallest']:.2g} to {x['largest']:.2g})" for x in found.values()]
        lines.append(f"| {version} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default {STEPS})")
    parser.add_argument("--draws", type=int, default=DRAWS, help=f"of weights, batches and numbers (default {DRAWS})")
    parser.add_argument("--only", nargs="+", choices=PRESETS, default=list(PRESETS), help="versions (default all)")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, metavar="DIR", help="where to write (benchmarks/results)")
    args = parser.parse_args()
    for name in ("steps", "draws"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(args, name)}")

    reason = upstream.missing()
    if reason:
        print(f"cosyvoice is left out: {reason}")
    providers = [name for name in PROVIDERS if name != "cosyvoice" or not reason]
    curves = {
        version: [curves_of(version, args.steps, providers, draw=draw) for draw in range(args.draws)]
        for version in args.only
    }
    apart = {version: [distances(found) for found in draws] for version, draws in curves.items()}
    summaries = {version: summary(draws) for version, draws in apart.items()}
    print(table(summaries))

    today = datetime.date.today().isoformat()
    command = f"python benchmarks/training_parity.py --steps {args.steps} --draws {args.draws} --only "
    result = {
        "command": command + " ".join(args.only),
        "date": today,
        "optimizer": "Adam",
        "lr": LR,
        "summary": summaries,
        "distances": apart,
        "curves": curves,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"training-parity-{today}.json"
    path.write_text(json.dumps(result | describe(torch.device("cpu"))) + "\n")
    draw_picture(path.with_suffix(".png"), curves)
    print(f"{path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
