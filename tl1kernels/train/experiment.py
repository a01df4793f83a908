"""Many runs: in parallel, resumable; the search for lam and a, and the final runs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path
from statistics import mean
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import tl1kernels as tk
from tl1kernels.train.recipes import RECIPES
from tl1kernels.train.run import OPTIONS, Setting, run_to_file

Result = dict[str, Any]
T = TypeVar("T")

SEARCH_A = (0.01, 0.1, 1.0)
SHAPED = [
    method
    for method, options in OPTIONS.items()
    if options["penalty"] is not None and tk.PENALTIES[options["penalty"]].a is not None
]
"""The methods whose penalty has a shape parameter a to search for."""

CURVE_FACTORS = (0.3, 0.6, 1.4)
"""The curves' points beside the chosen lam, as multiples of it."""
CURVE_SEEDS = 2
PAPER_FACTORS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.2, 1.5, 2.0, 3.0)
PAPER_SEEDS = 3
PAPER_SHAPES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Six values of a, powers of ten, as in the paper's Fig. 7."""

BUDGET = 0.10
"""Share of the parameters that the search would like to leave at most."""
MOST_LOST = 0.05
"""Accuracy against no penalty that a chosen setting may lose at most."""


class InterruptedRunsError(Exception):
    """Ctrl-C, or a process was killed: some runs are on disk, the rest is not."""


def run_all(
    settings: Sequence[Setting], folder: Path, jobs: int, console: Console, data_folder: Path
) -> list[Result]:
    """Run every setting that has no result in `folder` yet; return all results, in order.

    Args:
        settings: what to run; duplicates are run once.
        folder: where the result files are.
        jobs: processes at a time, one thread each.
        console: where the progress bar goes.
        data_folder: where the data set is or is fetched to.

    Raises:
        DamagedRunError: a result in `folder` cannot be read.
        InterruptedRunsError: on Ctrl-C, or where a process was killed; what was finished is in
            `folder`, the same call goes on.
    """
    wanted = list(dict.fromkeys(settings))
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[Setting, Result] = {}
    pool = ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("training runs", total=len(wanted))
            futures: dict[Future[Result], Setting] = {
                pool.submit(run_to_file, setting, folder, data_folder): setting
                for setting in wanted
            }
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                progress.advance(task)
    except BrokenProcessPool:
        raise InterruptedRunsError(
            "a run's process was killed, perhaps for memory: fewer --jobs take less; the same "
            "command goes on"
        ) from None
    except KeyboardInterrupt:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        finished = sum((folder / f"{s.file_name}.json").exists() for s in wanted)
        raise InterruptedRunsError(
            f"{finished} of {len(wanted)} runs are saved in {folder}; "
            "the same command goes on from there"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [results[setting] for setting in settings]


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C for all
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """End this process when its parent has: the pool's workers would train on, or wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def default_jobs() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def search_settings(
    dataset: str, methods: Sequence[str], epochs: int | None = None
) -> list[Setting]:
    """Return the grid of lam and a for each method, judged on the validation split."""
    recipe, settings = RECIPES[dataset], []
    for method in dict.fromkeys(("none", *methods)):
        lams = (0.0,) if method == "none" else recipe.lam.get(method, recipe.grid)
        shapes = [a for a in _shapes(method) if _allowed(method, a, recipe.lr)]
        settings += [
            Setting(dataset, method, lam, a, seed, "validation", epochs)
            for lam, a, seed in product(lams, shapes, range(recipe.search_seeds))
        ]
    return settings


def _shapes(method: str) -> tuple[float, ...]:
    if method not in SHAPED:
        return (1.0,)
    return tuple(sorted({*SEARCH_A, float(tk.PENALTIES[OPTIONS[method]["penalty"]].a or 1)}))


def _allowed(method: str, a: float, step: float) -> bool:
    """Whether the penalty allows this shape: SCAD's and MCP's prox need an a beyond the step."""
    penalty = OPTIONS[method]["penalty"] if method != "none" else None
    return penalty is None or tk.PENALTIES[penalty].check(a, step) is None


def choose(results: Iterable[Result]) -> dict[str, dict[str, float]]:
    """Return, by method, the options to use and the validation figures that spoke for them.

    Of the settings that lose at most 5 points of accuracy against no penalty: the most accurate
    that leaves at most 10 % of the parameters, or the smallest where none does. Where every one of
    a method's settings loses more than 5 points, all of them count. All figures are means over the
    seeds.
    """
    by_options: dict[tuple[str, float, float], list[Result]] = {}
    for result in results:
        setting = result["setting"]
        by_options.setdefault((setting["method"], setting["lam"], setting["a"]), []).append(result)
    rows = [
        {
            "method": method,
            "lam": lam,
            "a": a,
            "accuracy": mean(r["accuracy"] for r in runs),
            "parameters": mean(r["sparsity"]["parameters_fraction"] for r in runs),
        }
        for (method, lam, a), runs in by_options.items()
    ]
    dense = max(row["accuracy"] for row in rows if row["method"] == "none")
    chosen = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        able = [row for row in mine if row["accuracy"] >= dense - MOST_LOST] or mine
        small = [row for row in able if row["parameters"] <= BUDGET]
        if small:
            best = max(small, key=lambda row: (row["accuracy"], -row["parameters"]))
        else:
            best = min(able, key=lambda row: row["parameters"])
        chosen[method] = {name: best[name] for name in ("lam", "a", "accuracy", "parameters")}
    return chosen


def at_the_edge(dataset: str, chosen: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a sentence for each method whose best lam may lie beyond those that were tried."""
    recipe = RECIPES[dataset]
    lines = []
    for method, row in chosen.items():
        lams = sorted(recipe.lam.get(method, recipe.grid))
        if method != "none" and row["lam"] in (lams[0], lams[-1]):
            end = "smallest" if row["lam"] == lams[0] else "largest"
            lines.append(f"{method}: lam {row['lam']:g} is the {end} that was tried")
    return lines


def chosen_path(dataset: str) -> Path:
    """Return the committed file that holds a data set's chosen options."""
    return Path(__file__).parent / "chosen" / f"{dataset}.json"


@dataclass(frozen=True)
class Runs(Generic[T]):
    """What is run for tables and pictures: settings before, results after.

    Attributes:
        table: every method with its chosen options, all seeds.
        curves: the same with other lam.
        shapes: integrated TL1 with other a.
    """

    table: list[T]
    curves: list[T]
    shapes: list[T]

    def all(self) -> list[T]:
        """Return all of them in one list."""
        return [*self.table, *self.curves, *self.shapes]

    def of(self, results: Sequence[Result]) -> Runs[Result]:
        """Return these runs' results, given in the order of `all`."""
        n, m = len(self.table), len(self.table) + len(self.curves)
        return Runs(list(results[:n]), list(results[n:m]), list(results[m:]))


def final_settings(
    dataset: str,
    methods: Sequence[str],
    seeds: int,
    epochs: int | None,
    chosen: Mapping[str, Mapping[str, float]],
    paper: bool = False,
    curves: bool = True,
) -> Runs[Setting]:
    """Return the runs on the test split; with `paper` those that its figures need, too.

    Args:
        curves: whether with other lam, for accuracy against size.
    """
    factors, few = (PAPER_FACTORS, PAPER_SEEDS) if paper else (CURVE_FACTORS, CURVE_SEEDS)
    table: list[Setting] = []
    points: list[Setting] = []
    shapes: list[Setting] = []
    for method in methods:
        lam, a = chosen[method]["lam"], chosen[method]["a"]
        base = Setting(dataset, method, lam, a, 0, "test", epochs)
        table += [replace(base, seed=seed) for seed in range(seeds)]
        if method != "none" and curves:
            others = product(factors, range(min(seeds, few)))
            points += [replace(base, lam=round(lam * f, 6), seed=seed) for f, seed in others]
        if method == "integrated_tl1" and paper:
            sweep = product(PAPER_SHAPES, range(seeds))
            shapes += [replace(base, a=shape, seed=seed) for shape, seed in sweep]
    return Runs(table, points, shapes)
