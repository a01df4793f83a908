"""Many runs: in parallel, resumable; the search for lam and a, and the final runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import tl1kernels as tk
from tl1kernels.train.run import METHODS, Setting, run_to_file

Result = dict[str, Any]

CURVE_FACTORS = (0.3, 0.6, 1.4)
"""The curves' points beside the chosen lam, as multiples of it."""
CURVE_SEEDS = 2

SEARCH_SEEDS = 5
SEARCH_LAM = {
    "l1": (0.2, 0.3, 0.4, 0.45, 0.5, 0.6, 0.8),
    "group_lasso": (0.5, 1.0, 1.5, 2.0, 2.5, 3.0),
    "sparse_group_lasso": (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "cges": (0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 1.0),
    "tl1": (0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4),
    "integrated_tl1": (0.15, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6),
}
SEARCH_A = (0.01, 0.1, 1.0)
SHAPED = [
    method
    for method, options in tk.PRESETS.items()
    if options["penalty"] is not None and tk.PENALTIES[options["penalty"]].a is not None
]
"""The methods whose penalty has a shape parameter a to search for."""

BUDGET = 0.10
"""Share of the parameters that the search would like to leave at most."""
MOST_LOST = 0.05
"""Accuracy against no penalty that a chosen setting may lose at most."""


class InterruptedRunsError(Exception):
    """Ctrl-C: some runs are on disk, the rest is not."""


def run_all(settings: Sequence[Setting], folder: Path, jobs: int, console: Console) -> list[Result]:
    """Run every setting that has no result in `folder` yet; return all results, in order.

    Args:
        settings: what to run; duplicates are run once.
        folder: where the result files are.
        jobs: processes at a time, one thread each.
        console: where the progress bar goes.

    Raises:
        InterruptedRunsError: on Ctrl-C; what was finished is in `folder`, the same call goes on.
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
                pool.submit(run_to_file, setting, folder): setting for setting in wanted
            }
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                progress.advance(task)
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
    torch.set_num_threads(1)


def default_jobs() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def search_settings(
    dataset: str, methods: Sequence[str], epochs: int | None = None
) -> list[Setting]:
    """Return the grid of lam and a for each method, judged on the validation split."""
    settings = []
    for method in dict.fromkeys(("none", *methods)):
        shapes = SEARCH_A if method in SHAPED else (1.0,)
        grid = product(SEARCH_LAM.get(method, (0.0,)), shapes, range(SEARCH_SEEDS))
        settings += [
            Setting(dataset, method, lam, a, seed, "validation", epochs or Setting.epochs)
            for lam, a, seed in grid
        ]
    return settings


def choose(results: Iterable[Result]) -> dict[str, dict[str, float]]:
    """Return, by method, the options to use and the validation figures that spoke for them.

    Of the settings that lose at most 5 points of accuracy against no penalty: the most accurate
    that leaves at most 10 % of the parameters, or the smallest where none does. All figures are
    means over the seeds.
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
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        able = [row for row in mine if row["accuracy"] >= dense - MOST_LOST] or mine
        small = [row for row in able if row["parameters"] <= BUDGET]
        if small:
            best = max(small, key=lambda row: (row["accuracy"], -row["parameters"]))
        elif able:
            best = min(able, key=lambda row: row["parameters"])
        else:
            continue
        chosen[method] = {name: best[name] for name in ("lam", "a", "accuracy", "parameters")}
    return chosen


def chosen_path(dataset: str) -> Path:
    """Return the committed file that holds a data set's chosen options."""
    return Path(__file__).parent / "chosen" / f"{dataset}.json"


def final_settings(
    dataset: str, methods: Sequence[str], seeds: int, epochs: int | None = None
) -> tuple[list[Setting], list[Setting]]:
    """Return the runs of the table (chosen options, all seeds) and those that the curves add."""
    chosen = json.loads(chosen_path(dataset).read_text())["chosen"]
    table, curves = [], []
    for method in methods:
        lam, a = chosen[method]["lam"], chosen[method]["a"]
        base = Setting(dataset, method, lam, a, 0, "test", epochs or Setting.epochs)
        table += [replace(base, seed=seed) for seed in range(seeds)]
        if method != "none":
            points = product(CURVE_FACTORS, range(min(seeds, CURVE_SEEDS)))
            curves += [replace(base, lam=round(lam * f, 6), seed=seed) for f, seed in points]
    return table, curves
