"""What `tl1kernels bench` does: a short benchmark of this machine, checked before it is timed."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from tl1kernels import backends
from tl1kernels.bench import plots, timing
from tl1kernels.bench.cases import PEER, Case, Step, cases, disagreement, growth, sides, step_bytes
from tl1kernels.cli import UsageError, choose_backend, make_out, require_among, try_step

SIDES = {"cpu": 4096, "cuda": 8192}


@dataclass
class Timed:
    """A case's figures: milliseconds, bytes a second, share of the copy, ratio to torch's fused.

    `ratio`, `lowest` and `highest` are None where torch has no such optimizer.
    """

    name: str
    axis: str
    at: int
    ms: float
    gb_per_s: float
    of_copy: float
    ratio: float | None = None
    lowest: float | None = None
    highest: float | None = None
    peer_ms: float | None = None


@dataclass
class Report:
    """All figures of one run, as its JSON file has them.

    Attributes:
        command: what makes it again.
        environment: processor or GPU, threads, versions.
        backend: which one every case ran on.
        copy_gb_per_s: bytes read and written by a copy, measured in the same run.
        results: the cases' figures.
        slopes: by axis, the exponent e of the fit ms = c * at^e over the upper half of its
            points, two at least.
        skipped: what could not be timed, and why.
    """

    command: str
    environment: dict[str, Any]
    backend: str
    copy_gb_per_s: float
    results: list[Timed] = field(default_factory=list)
    slopes: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    """Check, time, print and write; return the exit status, 1 where a step was wrong.

    Raises:
        UsageError: no such device or backend here, a folder that cannot be written, or more
            weights than memory has room for.
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device must be cpu where torch has no CUDA GPU, got 'cuda'")
    backend, source = choose_backend(args.backend, device)
    require_among(source, backend, backends.PREFERENCE[device], f" on {device}")
    try_step(backend, source, device)
    make_out(args.out)
    console = Console(stderr=args.json)
    side = args.size or SIDES[device]
    command = ["tl1kernels", "bench", "--device", device, "--backend", backend]
    command += ["--size", str(side), "--rounds", str(args.rounds)]
    environment = timing.environment(device)
    copy = timing.copy_bandwidth(device)
    report = Report(shlex.join(command), environment, backend, copy / 1e9)
    has = backends.BACKENDS[backend].penalties()
    wanted = [*cases(side), *growth(side, device)]
    clock = timing.on_host if device == "cpu" else timing.DeviceClock()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress, backends.use_backend(backend):
        task = progress.add_task("bench", total=len(wanted))
        for case in wanted:
            progress.update(task, description=f"{case.name:36}")
            penalty = case.options.get("penalty", "tl1")
            if penalty in has:
                with _enough_memory(side, case):
                    if wrong := disagreement(case, device):
                        raise WrongStepError(f"{case.name} on {backend}: {wrong}")
                    report.results.append(timed(case, device, clock, copy, args.rounds))
            else:
                report.skipped[case.name] = f"{backend} has no penalty {penalty!r}"
            progress.advance(task)
    report.slopes = slopes(report.results)
    path, picture = args.out / f"{device}.json", args.out / f"{device}.png"
    text = json.dumps(asdict(report), indent=2)
    path.write_text(text + "\n")
    plots.draw(asdict(report), picture)
    if args.json:
        print(text)
    else:
        print_tables(report, console)
    for written in (path, picture):
        console.print(f"Written to {written}", soft_wrap=True, highlight=False)
    return 0


class WrongStepError(Exception):
    """A step is not the reference's; nothing is written then."""


# What torch says where memory does not suffice, nor an int64 for its bytes or for the side alone;
# on the CPU it has no class of errors for these.
_TOO_LARGE = (
    *("can't allocate memory", "not enough memory"),
    *("Storage size calculation overflowed", "Overflow when unpacking long"),
)


@contextmanager
def _enough_memory(side: int, case: Case) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(words in str(error) for words in _TOO_LARGE):
            raise
        raise UsageError(
            f"--size must be smaller, got {side}: memory does not suffice for {case.name!r}"
        ) from error


def timed(
    case: Case, device: str, clock: Callable[[Step], float], copy: float, rounds: int
) -> Timed:
    """Time one case over three placements in memory."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads or before)
    try:
        seconds = timing.interleaved(lambda: sides(case, device), clock, rounds, placements=3)
    finally:
        torch.set_num_threads(before)
    of = [torch.empty(shape, dtype=case.dtype, device="meta") for shape in case.shapes]
    ours = float(np.median(seconds["ours"]))
    rate = step_bytes(case.rule, of) / ours
    result = Timed(case.name, case.axis, case.at, 1e3 * ours, rate / 1e9, rate / copy)
    if PEER in seconds:
        ratio = timing.ratio_of(seconds["ours"], seconds[PEER], rounds)
        result.ratio, result.peer_ms = ratio.ratio, ratio.peer_ms
        result.lowest, result.highest = ratio.lowest, ratio.highest
    return result


def slopes(results: list[Timed]) -> dict[str, float]:
    """Return the exponent of each axis' growth, fitted over the upper half of its points.

    Over two points at least: an axis of one has no slope.
    """
    found = {}
    for axis in dict.fromkeys(row.axis for row in results if row.axis):
        points = [(row.at, row.ms) for row in results if row.axis == axis]
        x, y = np.log(np.array(points[-max(2, (len(points) + 1) // 2) :])).T
        if len(x) > 1:
            found[axis] = float(np.polyfit(x, y, 1)[0])
    return found


def print_tables(report: Report, console: Console) -> None:
    """Print a row a case, and how cost grows."""
    where = report.environment.get("gpu", report.environment["processor"])
    title = (
        f"{where}, backend {report.backend}, copy {report.copy_gb_per_s:.0f} GB/s; "
        f"ratio to {PEER}, no prox"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(("case", "ms", "GB/s", "of copy", "ratio", "from, to")):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in report.results:
        ratio = ends = ""
        if row.ratio is not None:
            ratio, ends = f"{row.ratio:.2f}", f"{row.lowest:.2f}, {row.highest:.2f}"
        table.add_row(
            row.name, f"{row.ms:.3f}", f"{row.gb_per_s:.1f}", f"{row.of_copy:.0%}", ratio, ends
        )
    console.print(table)
    ratios = [row.ratio for row in report.results if row.ratio is not None and not row.axis]
    mean = timing.geometric_mean(ratios)
    console.print(f"geometric mean {mean:.2f} x {PEER}, no prox, over {len(ratios)} cases")
    for axis, slope in report.slopes.items():
        console.print(f"ms grows with {axis} to the power {slope:.2f}")
    for name, why in report.skipped.items():
        console.print(f"not timed: {name}: {why}")
