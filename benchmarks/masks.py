"""Draw the masks that ``attention`` understands, from the rule itself: python benchmarks/masks.py [FILE]"""

import sys
from pathlib import Path
from typing import Any

import torch

from fastflow.ops.attention import visible_keys

FRAMES = 24
MASKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lengths=[17]", {"lengths": torch.tensor([17])}),
    ("lengths=[17]\npadded_queries=False", {"lengths": torch.tensor([17]), "padded_queries": False}),
    ("chunk_size=6", {"chunk_size": 6}),
    ("chunk_size=6, lengths=[17]", {"chunk_size": 6, "lengths": torch.tensor([17])}),
    ("chunk_size=6\nnum_left_chunks=1", {"chunk_size": 6, "num_left_chunks": 1}),
    ("key_offset=12, chunk_size=6\n(queries after cached keys)", {"key_offset": 12, "chunk_size": 6, "queries": 12}),
)


def draw(path: Path) -> None:
    """One panel per mask: queries down, keys to the right, dark where a query sees a key."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.9), dpi=110, layout="constrained")
    for axis, (title, rule) in zip(figure.subplots(1, len(MASKS)), MASKS, strict=True):
        queries = rule.get("queries", FRAMES)
        visible = visible_keys(**{"lengths": None, "keys": FRAMES, "queries": queries, **rule})
        axis.imshow(visible.expand(1, queries, FRAMES)[0], cmap="Blues", vmin=0, vmax=1.3, aspect="equal")
        axis.set_title(title, fontsize=8)
        axis.set(xticks=[], yticks=[], xlabel="key", ylabel="query")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "attention-masks.png")
