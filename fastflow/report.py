"""What a flow costs, part by part: parameters, FLOPs, bytes saved for backward; and what shrinking it would buy.

One training forward pass per memory mode runs on fake tensors, which have shapes but no data, so even the largest flow
takes seconds and no memory worth the name.  A row of a training batch passes the same layers as an utterance of as many
frames, except that the solver calls the estimator ten times with two rows each (guidance), and does once what the steps
share; so the FLOPs of inference follow.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastflow import config, dit, unet
from fastflow.backend import current_backend
from fastflow.flow import N_TIMESTEPS
from fastflow.length_regulator import MEL_RATE
from fastflow.ops.norm import Norm
from fastflow.recompute import MODES, Block
from fastflow.testing.counters import Counts, SavedTensors, current_module

GUIDED_ROWS = 2  # with and without condition
ESTIMATOR = "decoder.estimator"
HALVES = (unet.Attention, unet.FeedForward, dit.Attention, dit.FeedForward)  # of blocks that are one op
ADAM_BYTES = 16  # of a parameter in float32: itself, its gradient, two moments
TABLE_WIDTH = 132  # characters, no less than the widest table has
USABLE = 0.9  # of a GPU's memory; the rest is for the CUDA context, workspaces and what fragmentation wastes
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Cost:
    """Cost of a part of a flow.

    Attributes:
        name: qualified name of the submodule, list indices left out.
        parameters: number of parameters.
        flops_per_step: floating point operations of one solver step of an utterance, guidance included.
        flops_per_utterance: floating point operations of one utterance, all solver steps included.
        saved_bytes: bytes that a training step keeps for backward.
    """

    name: str
    parameters: int
    flops_per_step: int
    flops_per_utterance: int
    saved_bytes: int


@dataclass(frozen=True)
class Change:
    """What removing layers saves.  ``saving.name`` says which."""

    option: str
    before: int
    after: int
    saving: Cost


@dataclass(frozen=True)
class Memory:
    """What a memory mode keeps for backward (see :mod:`fastflow.recompute`).

    Attributes:
        mode: its name.
        saved_bytes: of the whole training batch.
        peak_bytes: and the most that one block keeps while the backward pass computes it again.
        attention_bytes: of ``saved_bytes``, what the attention of one U-Net block at full frame rate keeps, its input
            included; None for a DiT.
        largest_batch: rows that fit the memory given, None without one; 0 if not even one does.
    """

    mode: str
    saved_bytes: int
    peak_bytes: int
    attention_bytes: int | None
    largest_batch: int | None


@dataclass(frozen=True)
class Report:
    """Costs of a flow for a training batch of ``batch`` rows, and an utterance, of ``frames`` mel frames each."""

    flow: str
    kind: str
    frames: int
    batch: int
    solver_steps: int
    backend: str
    torch: str
    total: Cost
    parts: list[Cost]
    what_if: list[Change]
    memory: list[Memory]
    upstream_attention_bytes: int | None


@contextmanager
def _tracing() -> Iterator[None]:
    """Fake tensors have no values, so argument checks must not look at them: as in torch.export."""
    flag, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = flag


def _training_batch(flow: Any, rows: int, frames: int) -> dict[str, Tensor]:
    """Full rows of ``frames`` mel frames."""
    if hasattr(flow, "token_mel_ratio"):
        if frames % flow.token_mel_ratio:
            raise ValueError(f"frames must be a multiple of {flow.token_mel_ratio} for this flow, got {frames}")
        tokens = frames // flow.token_mel_ratio
    else:
        tokens = max(1, round(frames / MEL_RATE * flow.input_frame_rate))
    return {
        "speech_token": torch.zeros(rows, tokens, dtype=torch.int64),
        "speech_token_len": torch.full((rows,), tokens),
        "speech_feat": torch.zeros(rows, frames, flow.output_size),
        "speech_feat_len": torch.full((rows,), frames),
        "embedding": torch.zeros(rows, flow.spk_embed_affine_layer.in_features),
    }


def _measure(spec: config.Spec, rows: int, frames: int) -> tuple[nn.Module, Counter[str], dict[str, Counter[str]]]:
    """Build the flow without memory and run training forwards: FLOPs, and for each mode saved bytes, by submodule."""
    python_draws, saved = random.getstate(), {}
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with fake, config.WeightsToCome():
            flow = config.build(spec)
        batch = _training_batch(flow, rows, frames)
        for mode in reversed(MODES):  # the FLOPs of the last are kept, though a forward pass has the same in every mode
            flow.recompute = mode  # type: ignore[assignment]
            random.seed(0)  # the first draw of this seed chooses full attention, not streaming
            with (
                fake,
                _tracing(),
                current_module(flow, HALVES) as where,
                SavedTensors(flow.parameters(), where) as tensors,
                Counts(where) as counts,
            ):
                flow(batch, "cpu")
            saved[mode] = tensors.by_name
    finally:
        random.setstate(python_draws)
    return flow, counts.flops, saved


def _within(names: Counter[str], module: str) -> int:
    """The sum over a module and its parts."""
    return sum(value for name, value in names.items() if (name + ".").startswith(module + "."))


def _attention_bytes(block: Any, rows: int, frames: int) -> int:
    """What the attention of a U-Net's block keeps in its memory mode; of a block that is computed again, its input."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.zeros(rows, frames, block.norm1.normalized_shape[0], requires_grad=True)
        if block.recompute == "block":
            return x.untyped_storage().nbytes()
        norm, lengths = Norm(block.norm1.weight, block.norm1.bias, block.norm1.eps), torch.full((rows,), frames)
        with _tracing(), SavedTensors([*block.parameters(), lengths]) as saved:
            block.attn1(x, norm, lengths, 0)
        return saved.bytes


def _upstream_attention_bytes(attention: Any, rows: int, frames: int) -> int:
    """What CosyVoice's keeps in float32: q, k, v, output, softmax sums, and the mask as a float for every head."""
    width, heads = attention.to_q.out_features, attention.heads
    return 4 * rows * frames * (4 * width + heads + heads * frames)


def _memory(
    flow: nn.Module, saved: dict[str, Counter[str]], rows: int, frames: int, memory: int | None
) -> tuple[list[Memory], int | None]:
    """Every mode, and what upstream's attention keeps."""
    blocks = [name for name, module in flow.named_modules() if isinstance(module, Block)]
    largest = max(_within(saved["none"], name) for name in blocks)
    fixed = ADAM_BYTES * sum(parameter.numel() for parameter in flow.parameters())
    estimator: Any = flow.decoder.estimator  # type: ignore[union-attr]
    block = estimator.down_blocks[0][1][-1] if hasattr(estimator, "down_blocks") else None
    modes = []
    for mode in MODES:
        total = saved[mode].total()
        peak = total + (largest if total < saved["none"].total() else 0)
        fits = None if memory is None else max(0, int((USABLE * memory - fixed) / (peak / rows)))
        flow.recompute = mode  # type: ignore[assignment]
        modes.append(Memory(mode, total, peak, block and _attention_bytes(block, rows, frames), fits))
    return modes, block and _upstream_attention_bytes(block.attn1, rows, frames)


def parse_memory(text: str) -> int:
    """Bytes of a size such as ``80GB`` or ``79.6GiB``.

    Raises:
        ValueError: not a positive number and a unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2].upper() not in _UNITS or not float(found[1]):
        raise ValueError(f"memory must be a number and one of MB, GB, TB, MiB, GiB, TiB, as in 80GB; got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


# Parts of the estimator that see the time alone: once per step, whatever the rows.
_TIME_ONLY = re.compile(rf"{re.escape(ESTIMATOR)}\.(time_mlp|time_embed|norm_out|.*\.mlp|.*\.attn_norm)\b")


def _shared_by_steps(flow: Any, flops: Counter[str]) -> Counter[str]:
    """FLOPs, of those of each submodule, that no step of a solver changes: DiT's projection of all channels but x's."""
    embedding = getattr(flow.decoder.estimator, "input_embed", None)
    if embedding is None:
        return Counter()
    name, channels = f"{ESTIMATOR}.input_embed.proj", embedding.proj.in_features
    return Counter({name: flops[name] * (channels - flow.output_size) // channels})


# Options that remove whole layers: the share that is kept, and which submodules go (k: layers that stay).
_LAYER_OPTIONS = (
    ("encoder.num_blocks", 1 / 2, r"encoder\.encoders\.(\d+)\."),
    (f"{ESTIMATOR}.num_mid_blocks", 2 / 3, r"decoder\.estimator\.mid_blocks\.(\d+)\."),
    (f"{ESTIMATOR}.n_blocks", 1 / 2, r"decoder\.estimator\.(?:down|mid|up)_blocks\.\d+\.1\.(\d+)\."),
    (f"{ESTIMATOR}.depth", 1 / 2, r"decoder\.estimator\.transformer_blocks\.(\d+)\."),
)


def _part(name: str) -> str:
    """The part that a submodule belongs to: a level inside the encoder, two in the decoder, and DiT blocks' adaLN."""
    words = [word for word in name.split(".") if not word.isdigit()]
    depth = {"encoder": 2, "decoder": 4 if "attn_norm" in words else 3}.get(words[0], 1)
    return ".".join(words[:depth]) or "(loss and masks)"


def report(spec: config.Spec, name: str, frames: int = 500, batch: int = 4, memory: int | None = None) -> Report:
    """Measure the flow that a spec describes.

    Args:
        spec: as :func:`fastflow.config.preset` and :func:`fastflow.config.read_yaml` give it.
        name: what to call it.
        frames: mel frames of each row of the training batch and of the utterance, its prompt included.
        batch: rows of the training batch.
        memory: bytes of a GPU, to say for every memory mode how many rows fit: ``0.9 * memory`` holds the parameters,
            their gradients and Adam's moments (16 bytes a parameter, float32), and for each row its share of
            ``peak_bytes``.

    Raises:
        ValueError: frames or batch below 1, or frames that are no multiple of the frames per token.
    """
    for argument, value in (("frames", frames), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{argument} must be >= 1, got {value}")
    flow, flops, kept = _measure(spec, batch, frames)
    saved = kept["auto"]
    parameters: Counter[str] = Counter()
    for key, parameter in flow.named_parameters():
        parameters[key.rpartition(".")[0]] += parameter.numel()

    shared = _shared_by_steps(flow, flops)

    def cost(label: str, names: Sequence[str]) -> Cost:
        rows = {n: 1 if _TIME_ONLY.match(n) else GUIDED_ROWS for n in names if n.startswith(ESTIMATOR)}
        step = sum((flops[n] - shared[n]) * rows[n] for n in rows) // batch
        once = sum(shared[n] * rows[n] if n in rows else flops[n] for n in names) // batch
        return Cost(
            name=label,
            parameters=sum(parameters[n] for n in names),
            flops_per_step=step,
            flops_per_utterance=once + N_TIMESTEPS * step,
            saved_bytes=sum(saved[n] for n in names),
        )

    order = {n: (n.startswith("decoder"), i) for i, (n, _) in enumerate(flow.named_modules())}  # data passes it last
    names = sorted({*parameters, *flops, *saved}, key=order.__getitem__)
    parts: dict[str, list[str]] = {}
    for n in names:
        parts.setdefault(_part(n), []).append(n)
    changes = []
    for option, keep, pattern in _LAYER_OPTIONS:
        index = {n: int(found[1]) for n in names if (found := re.match(pattern, n + "."))}
        before = max(index.values(), default=-1) + 1
        after = round(before * keep)
        if 0 < after < before:
            saving = cost(f"{option} {before} -> {after}", [n for n, i in index.items() if i >= after])
            changes.append(Change(option, before, after, saving))
    modes, upstream_attention = _memory(flow, kept, batch, frames, memory)
    return Report(
        flow=name,
        kind=type(flow).__name__,
        frames=frames,
        batch=batch,
        solver_steps=N_TIMESTEPS,
        backend=current_backend(),
        torch=torch.__version__,
        total=cost("total", names),
        parts=[cost(label, group) for label, group in parts.items()],
        what_if=changes,
        memory=modes,
        upstream_attention_bytes=upstream_attention,
    )


def _show_memory(console: Any, result: Report) -> None:
    from rich.table import Table

    trained = result.frames * result.batch
    modes = Table("recompute", title="Memory modes of the training step", title_justify="left")
    heads = ["saved MiB", "saved KiB\nper frame", "at the peak\nMiB"]
    if result.upstream_attention_bytes:
        heads += ["attention of one\nU-Net block, MiB", "of upstream's"]
    if result.memory[0].largest_batch is not None:
        heads.append(f"rows of {result.frames}\nthat fit")
    for head in heads:
        modes.add_column(head, justify="right")
    for mode in result.memory:
        row = [f"{mode.saved_bytes / 2**20:,.1f}", f"{mode.saved_bytes / trained / 1024:,.1f}"]
        row.append(f"{mode.peak_bytes / 2**20:,.1f}")
        if result.upstream_attention_bytes and mode.attention_bytes is not None:
            row.append(f"{mode.attention_bytes / 2**20:,.1f}")
            row.append(f"1/{result.upstream_attention_bytes / mode.attention_bytes:.1f}")
        if mode.largest_batch is not None:
            row.append(f"{mode.largest_batch:,}")
        modes.add_row(mode.mode, *row)
    console.print(modes)
    if result.upstream_attention_bytes:
        console.print(
            f"Upstream's attention keeps {result.upstream_attention_bytes / 2**20:,.1f} MiB beside its input: q, k, v, "
            "the output, and the mask as a float for every head.",
            highlight=False,
        )


def show(result: Report) -> None:
    """Print the report as tables.

    Raises:
        ImportError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ImportError("the tables need rich: pip install fastflow[demo]; --json does without") from error
    total, frames = result.total, result.frames
    trained = frames * result.batch

    def share(value: int, of: int) -> str:
        return f"{100 * value / of:.1f}%" if of else "-"

    def cells(cost: Cost) -> list[str]:
        return [
            cost.name.replace(ESTIMATOR, "estimator"),
            f"{cost.parameters:,}",
            share(cost.parameters, total.parameters),
            f"{cost.flops_per_step / frames / 1e6:,.2f}",
            f"{cost.flops_per_utterance / frames / 1e6:,.1f}",
            share(cost.flops_per_utterance, total.flops_per_utterance),
            f"{cost.saved_bytes / trained / 1024:,.1f}",
            share(cost.saved_bytes, total.saved_bytes),
        ]

    def table(title: str, first: str, costs: Iterable[Cost]) -> Table:
        heads = ["parameters", "", "MFLOP/frame\nper step", "MFLOP/frame\nall steps", "", "saved KiB\nper frame", ""]
        grid = Table(first, title=title, title_justify="left")
        for head in heads:
            grid.add_column(head, justify="right")
        for cost in costs:
            grid.add_row(*cells(cost))
        return grid

    # Where a table does not fit, rich would cut names and numbers: lines that are too long serve better.
    console = Console(width=max(Console().width, TABLE_WIDTH))
    parts = table(f"{result.flow} ({result.kind})", "part", result.parts)
    parts.add_section()
    parts.add_row(*cells(total))
    console.print(parts)
    console.print(
        f"An utterance of {frames} frames, prompt included: {total.flops_per_utterance / 1e12:.2f} TFLOP in "
        f"{result.solver_steps} solver steps with guidance.\n"
        f"A training batch of {result.batch} x {frames} frames in float32: {total.saved_bytes / 2**20:,.0f} MiB saved "
        f"for backward, backend {result.backend}.",
        highlight=False,
    )
    console.print()
    _show_memory(console, result)
    if result.what_if:
        console.print()
        console.print(table("What shrinking would save", "change", [change.saving for change in result.what_if]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fastflow report``."""
    parser.add_argument(
        "flow", nargs="?", default="cosyvoice", metavar="PRESET|YAML", help="preset or CosyVoice yaml (cosyvoice)"
    )
    parser.add_argument("--frames", type=int, default=500, help="mel frames of a row and of the utterance (500)")
    parser.add_argument("--batch", type=int, default=4, help="rows of the training batch (4)")
    parser.add_argument("--memory", metavar="80GB", help="of a GPU, to say how many rows fit it in every memory mode")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """``fastflow report``: print the costs of a preset or of the flow in a yaml file.

    Raises:
        ValueError: neither a preset nor a file, or sizes that do not fit.
    """
    is_file = Path(args.flow).is_file()
    spec = config.read_yaml(args.flow) if is_file else config.preset(args.flow)
    memory = None if args.memory is None else parse_memory(args.memory)
    result = report(spec, Path(args.flow).name if is_file else args.flow, args.frames, args.batch, memory)
    if args.json:
        print(json.dumps(asdict(result), indent=2))
    else:
        show(result)
    return 0
