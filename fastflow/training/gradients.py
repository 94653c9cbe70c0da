"""Which gradient reaches which part of a flow.

There is one loss, the squared error of the estimator's velocity, and it trains every part, because nothing on the way
is detached.  The estimator reads mu, the speaker vector and the known frames beside the noisy mel.  mu *is* the output
of the encoder (through the length regulator or the two-fold repetition), so the gradient of the loss passes from the
estimator's first layer into mu and on into length regulator or pre-lookahead, encoder, and the rows of the token table
that occur in the batch; the speaker vector carries it, summed over all frames, into the speaker affine layer.

What gets none:

* rows whose condition is dropped for classifier-free guidance (``training_cfg_rate``, 20 %): mu and the speaker vector
  are multiplied by zero, so such a row trains the estimator only.  The gradients are zero there, not missing, which is
  why DistributedDataParallel needs no ``find_unused_parameters``;
* tokens that do not occur in the batch, and padding: their rows of the table have gradient zero;
* the condition prefix itself, the noisy mel and the x-vector: they are data.  The frames that a prefix reveals still
  count in the loss and still send gradient through mu; knowing the answer, the estimator only needs mu less there.
* the weights that read the known frames (a quarter of the estimator's first layer), in a batch without any prefix;
* the bias of attention keys, up to rounding: it adds the same number to all scores of a query, which the softmax
  ignores.
"""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastflow.training.parts import blocks, named_part_parameters, unwrapped
from fastflow.training.rng import preserved_rng


@dataclass(frozen=True)
class Gradient:
    """What reached a part or a block.

    Attributes:
        name: of the part, or qualified name of the block.
        part: the part it belongs to.
        parameters: how many numbers it holds.
        norm: Euclidean norm of the gradient.
        without: share of the numbers, 0 to 1, whose gradient is missing or exactly zero.
        frozen: share of the numbers that are not trained (``requires_grad=False``).
    """

    name: str
    part: str
    parameters: int
    norm: float
    without: float
    frozen: float


@dataclass(frozen=True)
class GradientFlow:
    """The gradient of one batch.

    Attributes:
        loss: of the batch.
        parts, blocks: in the order in which the batch passes them.
    """

    loss: float
    parts: list[Gradient]
    blocks: list[Gradient]

    def table(self) -> str:
        """A table of parts and blocks, drawn by rich where it is installed, else as plain text."""
        rows = []
        for part in self.parts:
            inside = [block for block in self.blocks if block.part == part.name]
            rows.append(_cells(part.name, part))
            if len(inside) > 1:
                rows += [_cells(f"  {block.name}", block) for block in inside]
        title = f"gradient of a loss of {self.loss:.4g}"
        heads = ["part, block", "parameters", "gradient norm", "without gradient", "frozen"]
        draw = _plain_table if importlib.util.find_spec("rich") is None else _rich_table
        return draw(title, heads, rows)

    def plot(self, path: str | Path) -> None:
        """Draw the norm of every block, coloured by part, as a picture (png, svg, pdf by its suffix).

        Raises:
            ImportError: matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install 'fastflow[demo]'") from error
        figure = Figure(figsize=(9, 1.5 + 0.22 * len(self.blocks)), dpi=110, layout="constrained")
        axis = figure.add_subplot()
        for number, part in enumerate(self.parts):
            places = [i for i, block in enumerate(self.blocks) if block.part == part.name]
            norms = [self.blocks[i].norm for i in places]
            axis.barh(places, norms, color=f"C{number}", label=f"{part.name}: {part.norm:.3g}")
        axis.set_yticks(range(len(self.blocks)), [block.name for block in self.blocks], fontsize=8)
        axis.invert_yaxis()
        if any(block.norm > 0 for block in self.blocks):
            axis.set_xscale("log")
        axis.set(xlabel="gradient norm", title=f"gradient of a loss of {self.loss:.4g}")
        axis.legend(frameon=False, title="part: norm")
        axis.grid(axis="x", alpha=0.3)
        figure.savefig(path)


def gradient_flow(flow: nn.Module, batch: Mapping[str, Tensor]) -> GradientFlow:
    """Compute the loss of ``batch`` and its gradient, and say what reached each part and each block.

    The flow's ``.grad``, its mode and all generators stay as they were; the draws are those that the next training
    step would make.  Runs where the flow is, in the precision of the caller's autocast.

    Args:
        flow: a flow of CosyVoice 1, 2 or 3, fastflow's or upstream's.
        batch: what its ``forward`` takes.

    Raises:
        ValueError: every parameter is frozen, or the batch does not fit.
        TypeError: not a flow.
    """
    flow = unwrapped(flow)
    trained = [p for p in flow.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("flow has no parameter that requires a gradient: unfreeze a part first")
    device = trained[0].device
    with preserved_rng(device), torch.enable_grad():
        loss = flow(batch, device)["loss"]
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
    figures = _figures(trained, grads)

    def gradient(name: str, part: str, parameters: Sequence[nn.Parameter]) -> Gradient:
        count = max(1, sum(p.numel() for p in parameters))
        reached = [figures[p] for p in parameters if p in figures]
        return Gradient(
            name,
            part,
            sum(p.numel() for p in parameters),
            sum(square for square, _ in reached) ** 0.5,
            1 - sum(nonzero for _, nonzero in reached) / count,
            sum(p.numel() for p in parameters if not p.requires_grad) / count,
        )

    whole = [gradient(part, part, list(named.values())) for part, named in named_part_parameters(flow).items()]
    return GradientFlow(loss.item(), whole, [gradient(block, part, ps) for part, block, ps in blocks(flow)])


def _figures(
    parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None]
) -> dict[nn.Parameter, tuple[float, float]]:
    """Square of the norm and number of non-zeros of each gradient that exists, read from the device at once."""
    there = [(p, grad) for p, grad in zip(parameters, grads, strict=True) if grad is not None]
    if not there:
        return {}
    rows = [torch.stack([g.double().square().sum(), g.count_nonzero().double()]) for _, g in there]
    return {p: (square, count) for (p, _), (square, count) in zip(there, torch.stack(rows).tolist(), strict=True)}


def _cells(name: str, gradient: Gradient) -> list[str]:
    numbers = [f"{gradient.parameters:,}", f"{gradient.norm:.3g}", f"{gradient.without:.1%}"]
    return [name, *numbers, f"{gradient.frozen:.0%}" if gradient.frozen else ""]


def _plain_table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in [heads, *rows]
    ]
    return "\n".join([title, *lines])


def _rich_table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(heads[0], no_wrap=True)
    for head in heads[1:]:
        table.add_column(head, justify="right")
    for row in rows:
        if table.row_count and not row[0].startswith(" "):
            table.add_section()
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=max(len(row[0]) for row in rows) + 80).print(table)
    return text.getvalue().rstrip()
