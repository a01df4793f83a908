"""Timing with both sides interleaved, and the report that a run of bench/ ends in."""

import json
import math
import os
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

RESULTS = pytest.StashKey[list]()


@dataclass(frozen=True)
class Result:
    """One case: ours against one peer, medians of interleaved rounds, in milliseconds.

    A placement's ratio is the median of each round's: what slows the machine for a while slows both
    sides. `ratio` is the median over placements, `lowest` and `highest` are the ends.
    """

    case: str
    peer: str
    ours_ms: float
    peer_ms: float
    ratio: float  # ours over the peer's
    lowest: float
    highest: float
    bound: float  # of the ratio; the promise
    bytes: int  # that a step must read and write


def pytest_addoption(parser):
    parser.addoption("--json-out", help="write the ratios there")


def pytest_configure(config):
    config.stash[RESULTS] = []


@pytest.fixture
def against(benchmark, request):
    """Time ours (pytest-benchmark's target) with every peer run in between, each round.

    `make` returns our step and the peers' by name. It is called anew for each placement, and all
    stay in memory, so that none gets the pages of another: how fast memory is differs from one
    allocation to the next, by more than the two sides do.
    """

    def run(case, make, bounds, n_bytes, rounds=11, placements=7):
        made, first = [], next(iter(bounds))
        times = {name: [] for name in bounds}

        def peers_first():
            if len(times[first]) == rounds * len(made):
                made.append(make())
                ours, peers = made[-1]
                for side in (ours, *peers.values()) * 2:
                    side()
            for name, peer in made[-1][1].items():
                start = time.perf_counter()
                peer()
                times[name].append(time.perf_counter() - start)

        def ours():
            made[-1][0]()

        benchmark.pedantic(ours, setup=peers_first, rounds=rounds * placements)
        if benchmark.disabled:
            return
        ours_s = benchmark.stats.stats.data
        late = []
        for name, bound in bounds.items():
            every = [a / b for a, b in zip(ours_s, times[name], strict=True)]
            ratios = [
                statistics.median(every[i : i + rounds]) for i in range(0, len(every), rounds)
            ]
            ours_ms, peer_ms = (statistics.median(s) * 1e3 for s in (ours_s, times[name]))
            ratio = statistics.median(ratios)
            ends = min(ratios), max(ratios)
            result = Result(case, name, ours_ms, peer_ms, ratio, *ends, bound, n_bytes)
            request.config.stash[RESULTS].append(result)
            benchmark.extra_info[name] = ratio
            if ratio > bound:
                late.append(f"{ratio:.2f} x {name}, promised {bound:g}")
        assert not late, "; ".join(late)

    return run


@pytest.fixture
def against_on_gpu(benchmark, request):
    """Time ours and every peer in turn by the device's clock, or by the host's where it counts.

    By the device's clock each call finds the L2 cache full of something else. By the host's, a
    round is ten steps on end, as in training, from the first call to the last kernel's end.
    """

    def run(case, ours, peers, bounds, n_bytes, host=False, rounds=31):
        sides = {"ours": ours, **peers}
        if benchmark.disabled:
            benchmark.pedantic(ours, rounds=1)
            return
        flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        seconds = {name: [] for name in sides}
        for warm_up in [True] * 3 + [False] * rounds:
            for name, side in sides.items():
                took = ten_steps(side) if host else one_call(side, flush)
                if not warm_up:
                    seconds[name].append(took)
        benchmark.pedantic(lambda: (ours(), torch.cuda.synchronize()), rounds=5, warmup_rounds=1)
        ours_ms = statistics.median(seconds["ours"]) * 1e3
        for name in peers:
            pairs = zip(seconds["ours"], seconds[name], strict=True)
            ratios = sorted(a / b for a, b in pairs)
            ratio = statistics.median(ratios)
            peer_ms = statistics.median(seconds[name]) * 1e3
            ends = ratios[0], ratios[-1]
            result = Result(case, name, ours_ms, peer_ms, ratio, *ends, bounds[name], n_bytes)
            request.config.stash[RESULTS].append(result)
            benchmark.extra_info[name] = ratio
        late = [r for r in request.config.stash[RESULTS][-len(peers) :] if r.ratio > r.bound]
        assert not late, "; ".join(f"{r.ratio:.2f} x {r.peer}, promised {r.bound:g}" for r in late)

    return run


def one_call(side, flush):
    flush.fill_(1)
    torch.cuda._sleep(2_000_000)  # about 1 ms, in which the host gets all its calls out
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    side()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ten_steps(side):
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        side()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 10


def copy_bandwidth(device):
    """Return bytes read and written per second by a copy of 64 MiB, on a GPU of 1 GiB."""
    n = 1 << 28 if device == "cuda" else 1 << 24
    source, target = torch.randn(n, device=device), torch.empty(n, device=device)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times)


def environment(device):
    cpuinfo = Path("/proc/cpuinfo")
    models = cpuinfo.read_text().split("model name") if cpuinfo.exists() else []
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], check=False, capture_output=True, text=True
    )
    gpu = {}
    if device == "cuda":
        import triton

        gpu = {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
    return {
        **gpu,
        "processor": models[1].splitlines()[0].strip("\t: ") if len(models) > 1 else "unknown",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "commit": commit.stdout.strip(),
    }


def pytest_terminal_summary(terminalreporter, config):
    results = config.stash[RESULTS]
    if not results:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copy = copy_bandwidth(device)
    write = terminalreporter.write_line
    write("")
    write(f"copy {copy / 1e9:.1f} GB/s; medians, both sides interleaved in this process")
    write(
        f"{'case':58} {'ms':>8} {'GB/s':>7} {'of copy':>8}   "
        f"{'ratio':>7} {'from':>7} {'to':>7} {'bound':>7}  peer"
    )
    for r in results:
        rate = r.bytes / r.ours_ms * 1e3
        late = "" if r.ratio <= r.bound else "  LATE"
        write(
            f"{r.case:58} {r.ours_ms:8.3f} {rate / 1e9:7.1f} {rate / copy:8.0%}   "
            f"{r.ratio:7.4f} {r.lowest:7.4f} {r.highest:7.4f} {r.bound:7.4f}  {r.peer}{late}"
        )
    for peer in dict.fromkeys(r.peer for r in results):
        of_peer = [r.ratio for r in results if r.peer == peer]
        mean = math.exp(statistics.fmean(map(math.log, of_peer)))
        write(f"geometric mean {mean:.4f} over {len(of_peer)} cases: {peer}")
    if config.getoption("--json-out"):
        rows = [asdict(r) for r in results]
        report = {"environment": environment(device), "copy_gb_per_s": copy / 1e9, "results": rows}
        Path(config.getoption("--json-out")).write_text(json.dumps(report, indent=2) + "\n")
