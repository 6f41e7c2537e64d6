"""How fast a run is, and how much of its time goes to scoring."""

from __future__ import annotations

import statistics
import time

import torch


class Clock:
    """Times the steps of a run.

    The tracker's own seconds cover validation, directions and harvest. What scores cost inside the backward
    pass is found every so often by timing the same passes untracked (`due`, `calibrate`).
    """

    def __init__(self) -> None:
        self.total = self.passes = 0.0
        self.samples = 0
        self._extras: list[float] = []
        self._first: int | None = None

    def due(self, step: int) -> bool:
        """Whether to calibrate: at a process's third step (the first ones warm up), then every 20th."""
        self._first = step if self._first is None else self._first
        return (step - self._first) % 20 == 2

    def add(self, seconds: float, passes: float, samples: int) -> None:
        """Count one step: its seconds, those of its forward and backward passes, and its samples."""
        self.total += seconds
        self.passes += passes
        self.samples += samples

    def calibrate(self, tracked: float, plain: float) -> None:
        """Take in the seconds of the same passes with and without scores."""
        self._extras.append(1 - plain / tracked)

    def figures(self, seconds: dict[str, float]) -> dict[str, float]:
        """Samples per second, and the shares of the time that scoring and its validation passes take.

        Args:
            seconds: the tracker's, since this clock began.
        """
        extra = max(statistics.median(self._extras), 0.0) if self._extras else 0.0
        return {
            "samples_per_second": self.samples / self.total,
            "scoring_share": (sum(seconds.values()) + extra * self.passes) / self.total,
            "validation_share": seconds["validation"] / self.total,
        }


def now(device: torch.device | None = None) -> float:
    """The time in seconds; with a device, after it has finished what it was given."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
