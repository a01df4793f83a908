"""How a figure is taken: both sides of a ratio in turn, over several placements in memory."""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tl1kernels.backends import triton_launch
from tl1kernels.bench.cases import Step


@dataclass(frozen=True)
class Ratio:
    """Ours against a peer: medians in milliseconds, and how many times the peer's time ours is.

    A placement's ratio is the median of each round's: what slows the machine for a while slows both
    sides. `ratio` is the median over placements, `lowest` and `highest` are the ends.
    """

    ours_ms: float
    peer_ms: float
    ratio: float
    lowest: float
    highest: float


def ratio_of(ours: Sequence[float], peer: Sequence[float], rounds: int) -> Ratio:
    """Return the ratio of times in seconds, round by round, `rounds` of them in each placement."""
    every = [a / b for a, b in zip(ours, peer, strict=True)]
    ratios = [statistics.median(every[i : i + rounds]) for i in range(0, len(every), rounds)]
    ours_ms, peer_ms = (statistics.median(seconds) * 1e3 for seconds in (ours, peer))
    return Ratio(ours_ms, peer_ms, statistics.median(ratios), min(ratios), max(ratios))


def interleaved(
    make: Callable[[], Mapping[str, Step]],
    clock: Callable[[Step], float],
    rounds: int,
    placements: int,
) -> dict[str, list[float]]:
    """Return each side's times in seconds, all sides in turn in every round.

    `make` is called anew for each placement, and all stay in memory, so that none gets the pages of
    another: how fast memory is differs from one allocation to the next, by more than two sides do.
    """
    made: list[Mapping[str, Step]] = []
    seconds: dict[str, list[float]] = {}
    for _ in range(placements):
        made.append(make())
        for side in (*made[-1].values(),) * 2:
            side()
        for _ in range(rounds):
            for name, side in made[-1].items():
                seconds.setdefault(name, []).append(clock(side))
    return seconds


def on_host(side: Step) -> float:
    """Return the seconds of one call by the host's clock."""
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def ten_steps(side: Step) -> float:
    """Return the seconds of one of ten calls on end, from the first to the end of their kernels."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        side()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 10


class DeviceClock:
    """Seconds of one call by a GPU's clock; each call finds the L2 cache full of something else."""

    def __init__(self) -> None:
        self._flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")

    def __call__(self, side: Step) -> float:
        """Return the seconds of one call."""
        self._flush.fill_(1)
        torch.cuda._sleep(2_000_000)  # about 1 ms, in which the host gets all its calls out
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        side()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def copy_bandwidth(device: str) -> float:
    """Return bytes read and written per second by a copy of 64 MiB, on a GPU of 1 GiB."""
    n = 1 << 28 if device == "cuda" else 1 << 24
    source, target = torch.randn(n, device=device), torch.empty(n, device=device)

    def copy() -> None:
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * source.nbytes / statistics.median(on_host(copy) for _ in range(15))


def environment(device: str) -> dict[str, Any]:
    """Return what a figure depends on: processor or GPU, threads, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    models = cpuinfo.read_text().split("model name") if cpuinfo.exists() else []
    gpu = {}
    if device == "cuda":
        gpu = {"gpu": torch.cuda.get_device_name()}
        if triton_launch.unavailable() is None:
            import triton

            gpu["triton"] = triton.__version__
    return {
        **gpu,
        "processor": models[1].splitlines()[0].strip("\t: ") if len(models) > 1 else "unknown",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def machine(environment: Mapping[str, Any]) -> str:
    """Return a name for files: the GPU, or the processor and its threads."""
    name = environment.get("gpu") or f"{environment['processor']} {environment['threads']} threads"
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def geometric_mean(ratios: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(statistics.fmean(map(math.log, ratios)))
