"""What `tl1kernels train` does with its arguments."""

from __future__ import annotations

import argparse
import json
import shlex

import torch
from rich.console import Console

import tl1kernels as tk
from tl1kernels.train import experiment, report
from tl1kernels.train.data import DATA
from tl1kernels.train.networks import NETWORKS
from tl1kernels.train.run import METHODS


def run(args: argparse.Namespace) -> int:
    """Search or train, print and write the results; return the exit status."""
    console = Console()
    methods = tuple(dict.fromkeys(args.methods or METHODS))
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        console.print(f"--methods must be among {', '.join(METHODS)}, got {unknown[0]!r}")
        return 2
    try:
        return _search(args, methods, console) if args.search else _final(args, methods, console)
    except experiment.InterruptedRunsError as stop:
        console.print(f"\nInterrupted: {stop}.")
        return 130


def _command(args: argparse.Namespace) -> str:
    words = ["tl1kernels", "train", args.dataset]
    words += ["--search"] if args.search else ["--seeds", str(args.seeds)]
    if args.methods:
        words += ["--methods", *args.methods]
    if args.epochs:
        words += ["--epochs", str(args.epochs)]
    return shlex.join(words)


def _search(args: argparse.Namespace, methods: tuple[str, ...], console: Console) -> int:
    settings = experiment.search_settings(args.dataset, methods, args.epochs)
    jobs = args.jobs or experiment.default_jobs()
    results = experiment.run_all(settings, args.out / "runs", jobs, console)
    chosen = experiment.choose(results)
    headers = ["method", "lam", "a", "accuracy %", "parameters %"]
    table = report.plain_table("Chosen on the validation split", headers)
    for method, row in chosen.items():
        figures = (f"{100 * row[name]:.1f}" for name in ("accuracy", "parameters"))
        table.add_row(report.TITLES[method], f"{row['lam']:g}", f"{row['a']:g}", *figures)
    console.print(table)
    path = args.out / "chosen.json"
    path.write_text(json.dumps({"command": _command(args), "chosen": chosen}, indent=2) + "\n")
    console.print(
        f"Written to {path}; to use it, copy it over {experiment.chosen_path(args.dataset)}"
    )
    return 0


def _final(args: argparse.Namespace, methods: tuple[str, ...], console: Console) -> int:
    table, curves = experiment.final_settings(args.dataset, methods, args.seeds, args.epochs)
    jobs = args.jobs or experiment.default_jobs()
    results = experiment.run_all([*table, *curves], args.out / "runs", jobs, console)
    final = results[: len(table)]
    report.print_tables(report.summarize(final), args.dataset, console)
    files = report.write_all(args.out, final, results[len(table) :], _command(args))
    if "integrated_tl1" in methods:
        model = NETWORKS[args.dataset]()
        model.load_state_dict(torch.load(args.out / "models/integrated_tl1.pt", weights_only=True))
        _print_sparsity(tk.sparsity(model, DATA[args.dataset]("test").eval_images[:8]), console)
    for what, where in files.items():
        console.print(f"{what:>22}: {where}", soft_wrap=True)
    return 0


def _print_sparsity(left: tk.Sparsity, console: Console) -> None:
    header, *rows = left.rows()
    title = "What integrated TL1 left of the network of median accuracy"
    table = report.plain_table(title, [name.replace(" removed", "\nremoved") for name in header])
    for row in rows:
        table.add_row(*row)
    console.print(table)
