"""What the log says of a run's steps beside their loss."""

import math
from collections import deque
from statistics import median

import torch

from .distributed import Ranks
from .estimators import Estimate


LEAST = 0.6  # signal to noise, below which estimates were half as near to the gradient as they can be
NOISE = (
    "signal_to_noise is {:.2g}: the two members of a pair differ by less than pairs do, so that the coefficients "
    "measure curvature more than slopes. Try a quarter of smoothing_radius={:g}, or less."
)


class Figures:
    """What the log says of the steps since its last entry."""

    def __init__(self) -> None:
        self.estimates: deque[Estimate] = deque(maxlen=1000)
        self.probes, self.seconds = 0, 0.0

    def add(self, probes: int, seconds: float) -> None:
        """Count the probes of a micro-batch, of all ranks, none where its step is repeated."""
        self.probes, self.seconds = self.probes + probes, self.seconds + seconds

    def entry(self, ranks: Ranks) -> dict[str, float]:
        """The speed, what the estimates were like, and what a rank told the others."""
        finite = [e.coefficients[e.coefficients.isfinite()] for e in self.estimates]
        found = {
            "forward_passes_per_second": round(self.probes / self.seconds, 3),
            "coefficient_spread": torch.cat(finite).std(correction=0).item(),
            "left_out": sum(e.left_out for e in self.estimates) / len(self.estimates),
        }
        signals = [e.signal_to_noise for e in self.estimates if math.isfinite(e.signal_to_noise)]
        if signals:
            found["signal_to_noise"] = median(signals)
        if ranks.several:
            found["bytes_to_other_ranks"] = ranks.take_bytes() / len(self.estimates)
        return found
