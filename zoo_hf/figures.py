"""What the log says of a run's steps beside their loss."""

from collections import deque

import torch

from .distributed import Ranks
from .estimators import Estimate


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
        if ranks.several:
            found["bytes_to_other_ranks"] = ranks.take_bytes() / len(self.estimates)
        return found
