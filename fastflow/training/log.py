"""Figures of each step to a CSV file, and to TensorBoard."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class StepLog:
    """Writes ``figures.csv``, one line a step, flushed at once; and TensorBoard events beside it if asked to.

    A run that resumes at an earlier step drops the lines from that step on.

    Args:
        folder: made if it does not exist.
        columns: names of the figures.
        tensorboard: also write TensorBoard events.

    Raises:
        ImportError: TensorBoard is asked for and missing.
        ValueError: the file is there with other columns.
    """

    def __init__(self, folder: str | Path, columns: Sequence[str], tensorboard: bool) -> None:
        self.path = Path(folder) / "figures.csv"
        self._columns = ["step", *columns]
        self._folder, self._tensorboard = Path(folder), _summary_writer() if tensorboard else None
        self._events: Any = None
        self._file: Any = None

    def write(self, step: int, figures: Mapping[str, float | str]) -> None:
        if self._file is None:
            self._open(step)
        writer = csv.writer(self._file)
        writer.writerow([step, *(_cell(figures.get(name, "")) for name in self._columns[1:])])
        self._file.flush()
        if self._events is not None:
            for name, value in figures.items():
                if not isinstance(value, str) and math.isfinite(value):
                    self._events.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Show a picture file in TensorBoard, if that is written."""
        if self._events is not None:
            from matplotlib.image import imread

            self._events.add_image(name, imread(path)[..., :3], step, dataformats="HWC")

    def _open(self, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = []
        if self.path.exists():
            with open(self.path, newline="") as file:
                header, *rows = list(csv.reader(file)) or [self._columns]
            if header != self._columns:
                raise ValueError(f"{self.path} holds other figures: choose a new folder, or remove it")
            # the last line of a killed run may be torn
            lines = [row for row in rows if len(row) == len(header) and int(row[0]) < step]
        self._file = open(self.path, "w", newline="")  # noqa: SIM115  (stays open as long as the log)
        csv.writer(self._file).writerows([self._columns, *lines])
        if self._tensorboard is not None:
            self._events = self._tensorboard(str(self._folder), purge_step=step)

    def close(self) -> None:
        for file in (self._file, self._events):
            if file is not None:
                file.close()
        self._file = self._events = None


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else "" if math.isnan(value) else repr(value)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard=True needs TensorBoard: pip install 'fastflow[train]'") from error
    return SummaryWriter
