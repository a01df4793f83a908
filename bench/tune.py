"""What the GPU backends' schedules should be: their numbers varied one at a time, and timed.

Run: python -m bench.tune --out tune.json [--backend cuda] [--backend triton] [--workers 12]

Each case is stepped as it is committed and with every other value that makes a difference to it, in
turn, each on tensors of its own. First the results of a step are compared; a value that fails is
left out and named. What `--out` has is written after each case: whoever runs out of time keeps what
there is. On a GPU, workers first compile what Triton will need, side by side.
"""

import argparse
import json
import multiprocessing
import pickle
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch

import tl1kernels as tk
from bench.conftest import commit
from tl1kernels import backends
from tl1kernels.backends import cuda_schedule, triton_launch, triton_schedule
from tl1kernels.bench.cases import LR, MODELS, REGULARIZER, RULES, fresh, step_bytes
from tl1kernels.bench.timing import (
    DeviceClock,
    copy_bandwidth,
    environment,
    geometric_mean,
    interleaved,
    on_host,
    ten_steps,
)

COMMITTED = "as committed"


@dataclass(frozen=True)
class Knob:
    """A number of a backend's schedule, or a function of it, and what else it could be."""

    backend: str
    module: object
    name: str
    values: dict[str, object]

    @contextmanager
    def at(self, value: object) -> Iterator[None]:
        """Use a value inside the `with` block."""
        committed = getattr(self.module, self.name)
        setattr(self.module, self.name, value)
        try:
            yield
        finally:
            setattr(self.module, self.name, committed)


def numbers(*values: int) -> dict[str, object]:
    """Return values by what they are called."""
    return {str(value): value for value in values}


def tiles(*sizes: tuple[int, int]) -> dict[str, object]:
    """Return functions that always choose a tile of so many weights and warps."""

    def always(size: tuple[int, int]) -> Callable[..., triton_schedule.Tile]:
        return lambda *_: triton_schedule.Tile(*size)

    return {f"{weights} by {warps} warps": always((weights, warps)) for weights, warps in sizes}


KNOBS = [
    Knob("cuda", cuda_schedule, "HELD", numbers(9 << 10, 12 << 10, 24 << 10, 36 << 10)),
    Knob("cuda", cuda_schedule, "TILE", numbers(3584, 10240, 12288)),
    Knob("cuda", cuda_schedule, "ALONE", numbers(4096, 12288, 16384)),
    Knob("cuda", cuda_schedule, "PANEL", numbers(16, 32)),
    Knob(
        "triton",
        triton_schedule,
        "resident_tile",
        tiles((1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 32)),
    ),
    Knob(
        "triton",
        triton_schedule,
        "split_tile",
        tiles((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8)),
    ),
    Knob("triton", triton_schedule, "LONGEST", numbers(2048, 4096)),
    Knob("triton", triton_schedule, "COLUMNS", numbers(32, 128)),
    Knob("triton", triton_launch, "programs_at_once", {"two passes": lambda device: 1}),
]


@dataclass(frozen=True)
class Case:
    """A step to time."""

    name: str
    backend: str
    rule: str
    group_by: str | None
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]

    @property
    def is_model(self) -> bool:
        """Whether the host's time counts."""
        return len(self.shapes) > 1


def cases(backend: str, side: int) -> Iterator[Case]:
    """Yield what is timed; `side` is of the largest matrices."""
    square = ((side, side),)
    matrices = {
        "rows": ("out", square),
        "short rows": ("out", ((8 * side, side // 8),)),
        "columns": ("in", square),
        "columns of a wide matrix": ("in", ((side // 8, 8 * side),)),
        "input channels 3x3": ("in", ((side // 2, side // 4, 3, 3),)),
        "no groups": (None, square),
    }
    for dtype, rule in product((torch.float32, torch.bfloat16), ("SGD", "AdamW")):
        for name, (group_by, shapes) in matrices.items():
            kind = str(dtype).removeprefix("torch.")
            yield Case(f"{name}, {rule}, {kind}", backend, rule, group_by, dtype, shapes)
    for model, rule in product(("ResNet-50", "GPT-2 small"), ("SGD", "AdamW")):
        shapes = tuple(MODELS[model]()) if side > 1024 else ((side, side), (side,))
        yield Case(f"{model}, {rule}", backend, rule, "auto", torch.float32, shapes)


def prepared(case: Case, device: str) -> tuple[tk.ProxSGD | tk.ProxAdamW, list[torch.Tensor]]:
    """Return an optimizer, and its parameters, the same each time."""
    torch.manual_seed(0)
    params = [fresh(shape, case.dtype, device) for shape in case.shapes]
    ours, _, options, _ = RULES[case.rule]
    return ours(params, lr=LR, group_by=case.group_by, **options, **REGULARIZER), params


def work_of(schedule: triton_schedule.Schedule | cuda_schedule.Schedule) -> bytes:
    """Return all that makes a launch by a schedule differ from one of another."""
    if isinstance(schedule, cuda_schedule.Schedule):
        return pickle.dumps(schedule)
    works = [work for work in (schedule.resident, schedule.split) if len(work.items)]
    return pickle.dumps((schedule.layout, works))


def variants(
    case: Case, device: str, failed: list[str]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the steps by name: as committed, then with each value that makes a difference.

    Args:
        failed: is told which values cannot step, or end otherwise than the committed step.
    """

    def stepped(knob: Knob | None, value: object) -> tuple[Callable[[], None], bytes, list]:
        optimizer, params = prepared(case, device)

        def step() -> None:
            if knob is None:
                optimizer.step()
            else:
                with knob.at(value):
                    optimizer.step()

        step()
        (_, batch), *_ = optimizer._planned.batches._prepared
        return step, work_of(batch.layouts["kept"].schedule), params

    with tk.use_backend(case.backend):
        step, committed, want = stepped(None, None)
        want = [p.detach().clone() for p in want]
        yield COMMITTED, step
        for knob in KNOBS:
            for name, value in knob.values.items() if knob.backend == case.backend else ():
                try:
                    step, plan, got = stepped(knob, value)
                    if plan == committed:
                        continue
                    for p, q in zip(got, want, strict=True):
                        far = 8 * torch.finfo(case.dtype).eps * q.abs().max().item()
                        torch.testing.assert_close(p.detach(), q, rtol=0, atol=far)
                except (AssertionError, RuntimeError) as error:
                    failed.append(f"{knob.name} {name}: {error}")
                    continue
                yield f"{knob.name} {name}", step


def compile_all(case: Case, device: str) -> None:
    """Take each step of a case once, so that Triton's cache on disk has its kernels.

    What fails is not said here: it fails again when it is timed.
    """
    with suppress(RuntimeError):
        for _ in variants(case, device, []):
            pass


def timed(
    case: Case, device: str, copy: float, rounds: int, failed: list[str]
) -> list[dict[str, object]]:
    """Time a case; return a row for each variant."""
    sides = dict(variants(case, device, failed))
    params = [torch.empty(shape, dtype=case.dtype, device="meta") for shape in case.shapes]
    if case.is_model:
        peers = [fresh(shape, case.dtype, device) for shape in case.shapes]
        _, torchs, options, _ = RULES[case.rule]
        sides["torch fused"] = torchs(peers, lr=LR, fused=True, **options).step
    clock = on_host if device == "cpu" else ten_steps if case.is_model else DeviceClock()
    with tk.use_backend(case.backend):
        seconds = interleaved(lambda: sides, clock, rounds, placements=1)
    ours = statistics.median(seconds[COMMITTED])
    return [
        {
            "variant": name,
            "ms": statistics.median(of) * 1e3,
            "of_copy": step_bytes(case.rule, params) / statistics.median(of) / copy,
            "ratio": statistics.median(of) / ours,
        }
        for name, of in seconds.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Time what `--backend` names; print it, write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backend", action="append", choices=["cuda", "triton"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args(arguments)
    copy = copy_bandwidth(given.device)
    report = {
        "environment": {**environment(given.device), "commit": commit()},
        "copy_gb_per_s": copy / 1e9,
        "results": [],
    }
    any_failed = False
    for backend in given.backend or ["cuda", "triton"]:
        backends.require(backend)
        every = list(cases(backend, given.size))
        if given.workers and backend == "triton":
            with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
                list(pool.imap_unordered(partial(compile_all, device=given.device), every))
        for case in every:
            print(f"\n{backend}, {case.name}")
            failed: list[str] = []
            try:
                rows = timed(case, given.device, copy, given.rounds, failed)
            except RuntimeError as error:  # the committed step's
                failed, rows = [f"{COMMITTED}: {error}"], []
            for what in failed:
                print(f"  FAILED: {what}", flush=True)
            any_failed = any_failed or bool(failed)
            for row in sorted(rows, key=lambda row: row["ms"]):
                print(
                    f"  {row['variant']:36} {row['ms']:9.4f} ms {row['of_copy']:6.1%} of the copy"
                    f" {row['ratio']:6.3f}",
                    flush=True,
                )
            of = asdict(case) | {"dtype": str(case.dtype)}
            report["results"].append({"case": of, "rows": rows})
            given.out.write_text(json.dumps(report, indent=2) + "\n")
    print("\nvariant, its geometric mean over the cases that it makes a difference to")
    ratios: dict[tuple[str, str], list[float]] = {}
    for result in report["results"]:
        for row in result["rows"]:
            ratios.setdefault((result["case"]["backend"], row["variant"]), []).append(row["ratio"])
    for (backend, variant), of in sorted(ratios.items(), key=lambda item: geometric_mean(item[1])):
        print(f"  {backend:8}{variant:36} {geometric_mean(of):6.3f} of {len(of)}")
    return int(any_failed)


if __name__ == "__main__":
    sys.exit(main())
