"""Batches of about equal cost from utterances of unequal length, resumable in the middle of an epoch."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

WINDOW = 500  # samples that are sorted by length together, as upstream does


class FrameBatches:
    """An endless iterator over lists of indices, whose rows padded to the longest have at most ``max_frames`` frames.

    Each epoch shuffles all samples, sorts them by length within windows of 500, cuts them into batches and shuffles
    those.  A sample longer than ``max_frames`` is a batch of its own.  The order depends on the seed and the epoch
    alone; with several ranks each takes every ``world``-th batch, equally many.

    Args:
        lengths: frames of each sample.
        max_frames: frames of a batch, padding included.
        seed: of the order.
        rank, world: this process and the number of processes.

    Raises:
        ValueError: no sample, a number out of range, or fewer batches than processes.
    """

    def __init__(
        self, lengths: Sequence[int], max_frames: int, *, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if not lengths:
            raise ValueError("lengths is empty: at least one sample is needed")
        if max_frames < 1:
            raise ValueError(f"max_frames must be at least 1, got {max_frames}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in 0..{world - 1}, got {rank}")
        self.lengths, self.max_frames, self.seed, self.rank, self.world = list(lengths), max_frames, seed, rank, world
        self.epoch, self.position = 0, 0
        self._batches = self._cut(0)

    def _cut(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), WINDOW):
            batch: list[int] = []
            for index in sorted(order[start : start + WINDOW], key=self.lengths.__getitem__):
                # ascending, so this one is the longest
                if batch and self.lengths[index] * (len(batch) + 1) > self.max_frames:
                    batches.append(batch)
                    batch = []
                batch.append(index)
            batches.append(batch)
        if len(batches) < self.world:
            raise ValueError(f"only {len(batches)} batches for {self.world} processes: lower max_frames")
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return shuffled[self.rank : len(shuffled) // self.world * self.world : self.world]

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        if self.position == len(self._batches):
            self.epoch, self.position = self.epoch + 1, 0
            self._batches = self._cut(self.epoch)
        self.position += 1
        return self._batches[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, and what that depends on."""
        return {"epoch": self.epoch, "position": self.position, **self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Raises:
            ValueError: it was saved with other samples, batches or ranks.
        """
        for name, value in self._order().items():
            if state[name] != value:
                raise ValueError(f"{name} was {state[name]} when the state was saved and is {value} now")
        self.epoch, self.position = state["epoch"], state["position"]
        self._batches = self._cut(self.epoch)

    def _order(self) -> dict[str, int]:
        frames = math.fsum(self.lengths)
        return {
            "samples": len(self.lengths),
            "frames": int(frames),
            "max_frames": self.max_frames,
            "seed": self.seed,
            "world": self.world,
        }
