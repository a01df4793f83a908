"""Timing with both sides interleaved, and the report that a run of bench/ ends in."""

import json
import os
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path

import pytest
import torch

from tl1kernels.bench.timing import (
    DeviceClock,
    Ratio,
    copy_bandwidth,
    environment,
    geometric_mean,
    interleaved,
    machine,
    on_host,
    ratio_of,
    ten_steps,
)

REPORT = pytest.StashKey["Report"]()


@dataclass(frozen=True)
class Result(Ratio):
    """One case: ours against one peer."""

    case: str
    peer: str
    bound: float  # of the ratio; the promise
    bytes: int  # that a step must read and write

    @property
    def late(self):
        """Say what was promised, if it was not kept."""
        kept = self.ratio <= self.bound
        return "" if kept else f"{self.ratio:.2f} x {self.peer}, promised {self.bound:g}"


@dataclass
class Report:
    """What was measured so far; written anew with each result, for a run may be stopped.

    Attributes:
        path: where to; None for nowhere. What is there of the same commit, machine and day stays.
    """

    path: Path | None
    results: list[Result] = field(default_factory=list)
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def copy(self):
        """A copy's bytes a second, measured at the first result."""
        return copy_bandwidth(self.device)

    @cached_property
    def before(self):
        """The results of an earlier run that this one goes on with."""
        if self.path is None or not self.path.exists():
            return []
        there = json.loads(self.path.read_text())
        same = (there["environment"], there["date"]) == (self.where, f"{date.today()}")
        return there["results"] if same else []

    @cached_property
    def where(self):
        """What the figures depend on."""
        return {**environment(self.device), "commit": commit()}

    def add(self, result):
        """Take a result and write all of them."""
        self.results.append(result)
        if self.path is None:
            return
        if self.path.is_dir():
            self.path /= f"{machine(self.where)}-{date.today()}.json"
        new = [asdict(r) for r in self.results]
        known = {(row["case"], row["peer"]) for row in new}
        report = {
            "environment": self.where,
            "date": f"{date.today()}",
            "copy_gb_per_s": self.copy / 1e9,
            "results": [r for r in self.before if (r["case"], r["peer"]) not in known] + new,
        }
        draft = self.path.with_suffix(".part")  # whole or not at all
        draft.write_text(json.dumps(report, indent=2) + "\n")
        draft.replace(self.path)


def keep(request, case, peer, ratio, bound, n_bytes):
    """Add a result to the report, and to pytest-benchmark's; return it."""
    result = Result(**asdict(ratio), case=case, peer=peer, bound=bound, bytes=n_bytes)
    request.config.stash[REPORT].add(result)
    request.getfixturevalue("benchmark").extra_info[peer] = ratio.ratio
    return result


def pytest_addoption(parser):
    parser.addoption(
        "--json-out",
        type=Path,
        help="write the ratios there; in a folder, to <machine>-<date>.json",
    )


def pytest_configure(config):
    config.stash[REPORT] = Report(config.getoption("--json-out"))


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
                times[name].append(on_host(peer))

        def ours():
            made[-1][0]()

        benchmark.pedantic(ours, setup=peers_first, rounds=rounds * placements)
        if benchmark.disabled:
            return
        ours_s = benchmark.stats.stats.data
        results = [
            keep(request, case, name, ratio_of(ours_s, times[name], rounds), bound, n_bytes)
            for name, bound in bounds.items()
        ]
        late = [result.late for result in results if result.late]
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
        clock = ten_steps if host else DeviceClock()
        seconds = interleaved(lambda: sides, clock, rounds, placements=1)
        benchmark.pedantic(lambda: (ours(), torch.cuda.synchronize()), rounds=5, warmup_rounds=1)
        results = [
            # Each round counts as a placement: the ends are those of the rounds.
            keep(request, case, name, ratio_of(seconds["ours"], seconds[name], 1), bound, n_bytes)
            for name, bound in bounds.items()
        ]
        late = [result.late for result in results if result.late]
        assert not late, "; ".join(late)

    return run


def commit():
    """Return the commit that is timed, or what COMMIT says; `-dirty` where files have changed."""
    if told := os.environ.get("COMMIT"):
        return told
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return "unknown"
    return done.stdout.strip()


def pytest_terminal_summary(terminalreporter, config):
    report = config.stash[REPORT]
    results = report.results
    if not results:
        return
    copy = report.copy
    write = terminalreporter.write_line
    write("")
    write(f"copy {copy / 1e9:.1f} GB/s; medians, both sides interleaved in this process")
    write(
        f"{'case':58} {'ms':>8} {'GB/s':>7} {'of copy':>8}   "
        f"{'ratio':>7} {'from':>7} {'to':>7} {'bound':>7}  peer"
    )
    for r in results:
        rate = r.bytes / r.ours_ms * 1e3
        late = "  LATE" if r.late else ""
        write(
            f"{r.case:58} {r.ours_ms:8.3f} {rate / 1e9:7.1f} {rate / copy:8.0%}   "
            f"{r.ratio:7.4f} {r.lowest:7.4f} {r.highest:7.4f} {r.bound:7.4f}  {r.peer}{late}"
        )
    for peer in dict.fromkeys(r.peer for r in results):
        of_peer = [r.ratio for r in results if r.peer == peer]
        write(f"geometric mean {geometric_mean(of_peer):.4f} over {len(of_peer)} cases: {peer}")
    if report.path:
        write(f"written to {report.path}")
