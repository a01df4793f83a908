"""Tables, curves and pictures from results; every file says which runs it shows."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from tl1kernels.train.run import METHODS, Setting, environment

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Result = dict[str, Any]

TITLES = {
    "none": "no penalty",
    "l1": "l1",
    "group_lasso": "group lasso",
    "sparse_group_lasso": "sparse group lasso",
    "cges": "CGES",
    "tl1": "TL1",
    "integrated_tl1": "integrated TL1",
}
MEASURES = {
    "accuracy": "accuracy\n%",
    "flops": "FLOPs\n%",
    "parameters": "parameters\n%",
    "neurons_removed": "neurons\nremoved %",
}
"""Columns of the main table: the paper's Table 2, and neurons."""
LAST_LAYER = {
    "last_inputs_removed": "neurons\nremoved %",
    "last_zeros": "zeros among\nthe rest %",
}
"""Columns of the paper's Table 3: neurons without weights in the last layer, and what the others
lost there."""


def measures(result: Result) -> dict[str, float]:
    """Return one run's measures, all in per cent."""
    left = result["sparsity"]
    last = left["layers"][-1]
    fan_out = last["weights"] / last["inputs"]
    rest = (last["inputs"] - last["inputs_removed"]) * fan_out
    return {
        "accuracy": 100 * result["accuracy"],
        "flops": 100 * left["flops_fraction"],
        "parameters": 100 * left["parameters_fraction"],
        "neurons_removed": 100 * left["neurons_removed"] / left["neurons"],
        "last_inputs_removed": 100 * last["inputs_removed"] / last["inputs"],
        "last_zeros": 100 * (1 - last["weights_left"] / rest) if rest else 0.0,
    }


def summarize(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return one row for each method and its options: means and standard deviations over seeds."""
    runs: dict[tuple[str, float, float], list[Result]] = {}
    for result in results:
        setting = result["setting"]
        runs.setdefault((setting["method"], setting["lam"], setting["a"]), []).append(result)
    rows = []
    for (method, lam, a), group in runs.items():
        row: dict[str, Any] = {"method": method, "lam": lam, "a": a, "seeds": len(group)}
        every = [measures(result) for result in group]
        for name in (*MEASURES, *LAST_LAYER):
            values = [one[name] for one in every]
            row[name] = mean(values)
            row[f"{name}_std"] = stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
    return sorted(rows, key=lambda row: (METHODS.index(row["method"]), row["lam"]))


def plain_table(title: str, headers: Sequence[str]) -> Table:
    """Return an empty table that fits into 80 columns; the first column is on the left."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    return table


def print_tables(rows: Sequence[dict[str, Any]], dataset: str, console: Console) -> None:
    """Print the summary: mean ± standard deviation over the seeds."""
    seeds = rows[0]["seeds"]
    title = f"{dataset.upper()}, test split: mean ± standard deviation of {seeds} runs"
    for heading, columns in ((title, MEASURES), ("The same runs' last layer", LAST_LAYER)):
        table = plain_table(heading, ["method", "lam", "a", *columns.values()])
        for row in rows:
            cells = [f"{row[name]:.1f} ±{row[name + '_std']:.1f}" for name in columns]
            table.add_row(TITLES[row["method"]], f"{row['lam']:g}", f"{row['a']:g}", *cells)
        console.print(table)


def write_all(
    out: Path, table: Sequence[Result], curves: Sequence[Result], command: str
) -> dict[str, Path]:
    """Write table, curves, filters and models to `out`; return what is where."""
    rows = summarize(table)
    points = summarize([*table, *curves])
    files = {
        "table": out / "table.json",
        "table as CSV": out / "table.csv",
        "curves": out / "curves.png",
        "points of the curves": out / "curves.csv",
        "first-layer filters": out / "filters.png",
        "sparse models": out / "models",
    }
    summary = {"command": command, "environment": environment(), "rows": rows}
    files["table"].write_text(json.dumps(summary, indent=2) + "\n")
    _write_csv(files["table as CSV"], rows)
    _write_csv(files["points of the curves"], points)
    plot_curves(points, table[0]["setting"]["dataset"], files["curves"])
    models = copy_models(out, table)
    plot_filters(models, files["first-layer filters"])
    return files


def copy_models(out: Path, table: Sequence[Result]) -> dict[str, Path]:
    """Copy each method's state_dict of median accuracy to `models/<method>.pt`."""
    folder = out / "models"
    folder.mkdir(exist_ok=True)
    models = {}
    for method in METHODS:
        mine = [result for result in table if result["setting"]["method"] == method]
        if mine:
            median = sorted(mine, key=lambda result: result["accuracy"])[len(mine) // 2]
            source = out / "runs" / f"{Setting(**median['setting']).file_name}.pt"
            models[method] = Path(shutil.copyfile(source, folder / f"{method}.pt"))
    return models


def plot_curves(points: Sequence[dict[str, Any]], dataset: str, path: Path) -> None:
    """Plot accuracy against parameters, one line a method, one point a lam; from 85 % up."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method in METHODS:
        mine = [row for row in points if row["method"] == method]
        if not mine:
            continue
        mine.sort(key=lambda row: row["parameters"])
        axes.errorbar(
            [row["parameters"] for row in mine],
            [row["accuracy"] for row in mine],
            yerr=[row["accuracy_std"] for row in mine],
            marker="o",
            capsize=2,
            label=TITLES[method],
            linestyle="none" if method == "none" else "-",
        )
    axes.set(
        xscale="log",
        xlabel="parameters left, % (log scale)",
        ylabel="test accuracy, %",
        title=f"{dataset.upper()}: accuracy against size as lam grows",
        ylim=(85, 100),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_filters(models: dict[str, Path], path: Path) -> None:
    """Draw each model's first-layer filters; zero weights are white, dead filters crossed out."""
    figure, axes = plt.subplots(
        len(models), 1, figsize=(8, 0.9 * len(models)), layout="constrained", squeeze=False
    )
    for (method, file), ax in zip(models.items(), axes[:, 0], strict=True):
        state = torch.load(file, weights_only=True)
        filters = state["conv.weight"].flatten(0, 1)
        n, height, width = filters.shape
        gap = torch.full((n, height, 1), float("nan"))
        strip = torch.cat([filters, gap], 2).permute(1, 0, 2).reshape(height, -1)[:, :-1]
        limit = float(filters.abs().max()) or 1.0
        ax.imshow(strip.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
        for index in filters.flatten(1).eq(0).all(1).nonzero().flatten().tolist():
            left = index * (width + 1) - 0.5
            ax.plot([left, left + width], [-0.5, height - 0.5], color="black", linewidth=0.8)
            ax.plot([left, left + width], [height - 0.5, -0.5], color="black", linewidth=0.8)
        ax.set_ylabel(TITLES[method], rotation=0, ha="right", va="center")
        ax.set(xticks=[], yticks=[])
    figure.suptitle("First-layer filters (white: zero, crossed out: removed)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
