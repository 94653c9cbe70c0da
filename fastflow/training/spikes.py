"""Is a figure of this step out of the ordinary?  Judged by the median and the spread of the last steps."""

import math
import statistics
from collections import deque

NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
SMALLEST_HISTORY = 20
SMALLEST_FACTOR = 2.0


class SpikeDetector:
    """Call it with a positive figure of each step, in order; it says whether the figure is a spike.

    A spike lies above the median of the last ``window`` figures by more than ``threshold`` standard deviations and is
    at least twice that median.  Logarithms are compared, as losses and gradient norms vary by factors, and the standard
    deviation is taken from the median absolute deviation (Hampel, "The influence curve and its role in robust
    estimation", 1974), so a few spikes do not hide the next.  The first 20 figures are never spikes.  Spikes enter the
    history too: a run that has moved to another level is used to it after half a window.

    Args:
        window: figures remembered, at least 20.
        threshold: standard deviations.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, window: int = 200, threshold: float = 6.0) -> None:
        if window < SMALLEST_HISTORY:
            raise ValueError(f"window must be at least {SMALLEST_HISTORY} steps, got {window}")
        if not threshold > 0:
            raise ValueError(f"threshold must be > 0 standard deviations, got {threshold}")
        self.threshold = threshold
        self.history: deque[float] = deque(maxlen=window)

    def __call__(self, figure: float) -> bool:
        """Whether ``figure`` is a spike; figures that are not finite, or not positive, are neither that nor kept."""
        if not math.isfinite(figure) or figure <= 0:
            return False
        x = math.log(figure)
        spike = len(self.history) >= SMALLEST_HISTORY and x > self._limit()
        self.history.append(x)
        return spike

    def _limit(self) -> float:
        median = statistics.median(self.history)
        deviation = NORMAL * statistics.median(abs(x - median) for x in self.history)
        return median + max(self.threshold * deviation, math.log(SMALLEST_FACTOR))
