"""Peak memory of a stretch of code."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Bytes that were in use at most beyond those at the start: on the GPU what PyTorch has
    allocated in all, on the CPU the process's resident memory."""

    def __init__(self, device: str):
        self.device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif FORGET.exists():
            FORGET.write_text("5")
        self.start = 0 if self.device == "cuda" else _resident_peak()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self.bytes = _resident_peak() - self.start


def _resident_peak() -> int:
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
