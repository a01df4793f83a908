"""What `tl1kernels train` does with its arguments."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console

import tl1kernels as tk
from tl1kernels.cli import UsageError, choose_backend, make_out, require_among, try_step
from tl1kernels.train import data, experiment, figures, report
from tl1kernels.train.recipes import RECIPES
from tl1kernels.train.run import METHODS, OPTIONS, DamagedRunError


def run(args: argparse.Namespace) -> int:
    """Search or train, print and write the results; return the exit status.

    Raises:
        UsageError: the arguments do not fit together, the data set or the backend is not there, or
            --out cannot be written, or holds a run that cannot be read.
    """
    console = Console()
    _check(args)
    try_step(*choose_backend(None, "cpu"), "cpu")
    make_out(args.out)
    source, title = data.DATA[args.dataset], RECIPES[args.dataset].title
    try:
        # Here first, so that what is missing is fetched once, or said once.
        examples = source.load(title, "test", args.data).eval_inputs[:8]
    except (data.MissingDataError, ValueError) as error:
        raise UsageError(str(error)) from error
    try:
        return _search(args, console) if args.search else _final(args, examples, console)
    except DamagedRunError as error:
        raise UsageError(str(error)) from error
    except OSError as error:  # a file where a folder should be, or no room
        raise UsageError(f"--out {args.out} cannot be written to: {error}") from error
    except experiment.InterruptedRunsError as stop:
        console.print(f"\nInterrupted: {stop}.")
        return 130


def _check(args: argparse.Namespace) -> None:
    """Check the arguments and fill in those that depend on others."""
    require_among("dataset", args.dataset, RECIPES)
    args.methods = tuple(dict.fromkeys(args.methods or METHODS))
    for method in args.methods:
        require_among("--methods", method, ("none", *OPTIONS))
    args.out = args.out or Path("runs") / args.dataset
    args.data = args.data or Path("data") / args.dataset
    args.jobs = args.jobs or experiment.default_jobs()


def _command(args: argparse.Namespace) -> str:
    words = ["tl1kernels", "train", args.dataset]
    words += ["--search"] if args.search else ["--seeds", str(args.seeds)]
    extent = "--paper" if args.paper else "--tables" if args.tables else ""
    words += [extent] if extent and not args.search else []
    if args.methods != METHODS:
        words += ["--methods", *args.methods]
    if args.epochs:
        words += ["--epochs", str(args.epochs)]
    return shlex.join(words)


def _search(args: argparse.Namespace, console: Console) -> int:
    path = args.out / "chosen.json"
    earlier = _read_chosen(path) if path.exists() else {}  # of other methods, perhaps
    settings = experiment.search_settings(args.dataset, args.methods, args.epochs)
    results = experiment.run_all(settings, args.out / "runs", args.jobs, console, args.data)
    report.print_diverged(results, console)
    chosen = experiment.choose(results)
    headers = ["method", "lam", "a", "accuracy %", "parameters %"]
    table = report.plain_table("Chosen on the validation split", headers)
    for method, row in chosen.items():
        numbers = (f"{100 * row[name]:.1f}" for name in ("accuracy", "parameters"))
        table.add_row(report.TITLES[method], f"{row['lam']:g}", f"{row['a']:g}", *numbers)
    console.print(table)
    for line in experiment.at_the_edge(args.dataset, chosen):
        console.print(line, soft_wrap=True, highlight=False)
    found = {"command": _command(args), "chosen": {**earlier, **chosen}}
    path.write_text(json.dumps(found, indent=2) + "\n")
    if kept := [method for method in earlier if method not in chosen]:
        console.print(f"Kept from earlier searches: {', '.join(kept)}", soft_wrap=True)
    console.print(f"Written to {path}; the same command without --search uses it", soft_wrap=True)
    return 0


def _chosen(args: argparse.Namespace, console: Console) -> Mapping[str, Mapping[str, float]]:
    """Return the options that a search in the same folder chose, else those of the package."""
    of_package, own = experiment.chosen_path(args.dataset), args.out / "chosen.json"
    chosen: dict[str, Mapping[str, float]] = {}
    if of_package.exists():
        chosen |= _read_chosen(of_package)
    if own.exists():
        chosen |= _read_chosen(own)
        console.print(f"lam and a are those of {own}", soft_wrap=True, highlight=False)
    missing = [method for method in args.methods if method not in chosen]
    if missing:
        raise UsageError(
            f"no lam and a were chosen yet for {', '.join(missing)}: first run the same command "
            "with --search"
        )
    return chosen


def _read_chosen(file: Path) -> dict[str, Mapping[str, float]]:
    try:
        chosen = dict(json.loads(file.read_text())["chosen"])
        for of in chosen.values():
            tk.penalty_value(torch.zeros(1), lam=of["lam"], a=of["a"])  # raises if they are none
        return chosen
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} cannot be read as what a search chose ({type(error).__name__}: {error}): "
            "remove it; the same command with --search writes it anew"
        ) from error


def _final(args: argparse.Namespace, examples: torch.Tensor, console: Console) -> int:
    runs = experiment.final_settings(
        args.dataset,
        args.methods,
        args.seeds,
        args.epochs,
        _chosen(args, console),
        args.paper,
        curves=not args.tables,
    )
    folder = args.out / "runs"
    results = experiment.run_all(runs.all(), folder, args.jobs, console, args.data)
    report.print_diverged(results, console)
    done = runs.of(results)
    rows = report.summarize(done.table)
    report.add_ranks(rows)
    report.print_tables(rows, args.dataset, console)
    files = _write(args, done, rows, console)
    if "integrated_tl1" in args.methods:
        model = RECIPES[args.dataset].network()
        model.load_state_dict(torch.load(args.out / "models/integrated_tl1.pt", weights_only=True))
        _print_sparsity(tk.sparsity(model, examples), console)
    for what, where in files.items():
        console.print(f"{what:>34}: {where}", soft_wrap=True, highlight=False)
    return 0


def _write(
    args: argparse.Namespace, done: experiment.Runs, rows: list[report.Row], console: Console
) -> dict[str, Path]:
    """Write tables, figures and models to `--out`; return what is where."""
    out, command = args.out, _command(args)
    points = report.summarize([*done.table, *done.curves])
    models = report.copy_models(out, done.table)
    last = [
        {name: row[name] for name in ("method", "lam", "a", "seeds")}
        | {name: row[name] for key in report.TABLE_3 for name in (key, f"{key}_std")}
        for row in rows
    ]
    report.write(out, "table2", command, rows)
    report.write(out, "table3", command, last)
    figures.filters(models, out / "fig6-filters.png", command)
    files = {
        "comparison (Table 2)": out / "table2.csv",
        "last layer (Table 3)": out / "table3.csv",
        "first layers (Fig. 6)": out / "fig6-filters.png",
        "sparse models": out / "models",
    }
    if not args.tables:
        report.write(out, "fig4-curves", command, points)
        figures.curves(points, args.dataset, out / "fig4-curves.png", command)
        files["accuracy against size (Fig. 4)"] = out / "fig4-curves.png"
    return files | (_write_paper(args, done, rows, points, console) if args.paper else {})


def _write_paper(
    args: argparse.Namespace,
    done: experiment.Runs,
    rows: list[report.Row],
    points: list[report.Row],
    console: Console,
) -> dict[str, Path]:
    """Write what only --paper has; print what of the paper's claims holds."""
    out, command, dataset = args.out, _command(args), args.dataset
    every = [{**r["setting"], **report.measures(r)} for r in done.table]
    report.write(out, "fig3-boxplots", command, every)
    figures.contours(figures.TL1_CONTOURS, out / "fig1-tl1.png", command)
    figures.contours(figures.GROUP_CONTOURS, out / "fig2-groups.png", command)
    figures.boxplots(done.table, dataset, out / "fig3-boxplots.png", command)
    history = figures.histories(done.table, dataset, out / "fig5-iterations.png", command)
    report.write(out, "fig5-iterations", command, history)
    files = {
        "contours of TL1 (Fig. 1)": out / "fig1-tl1.png",
        "contours of groups (Fig. 2)": out / "fig2-groups.png",
        "spread over runs (Fig. 3)": out / "fig3-boxplots.png",
        "accuracy against iterations (Fig. 5)": out / "fig5-iterations.png",
    }
    shapes = report.summarize(done.shapes)
    if shapes:
        report.write(out, "fig7-shapes", command, shapes)
        figures.shapes(shapes, dataset, out / "fig7-shapes.png", command)
        files["the shape a (Fig. 7)"] = out / "fig7-shapes.png"
    found = report.findings(rows, points, shapes)
    report.write(out, "findings", command, found)
    report.print_findings(found, console)
    return files | {"what holds of the paper's claims": out / "findings.json"}


def _print_sparsity(left: tk.Sparsity, console: Console) -> None:
    header, *rows = left.rows()
    title = "What integrated TL1 left of the network of median accuracy"
    table = report.plain_table(title, [name.replace(" removed", "\nremoved") for name in header])
    for row in rows:
        table.add_row(*row)
    console.print(table)
