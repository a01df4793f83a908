"""The paper's figures from results; each PNG carries the command that makes it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

import tl1kernels as tk
from tl1kernels.train.recipes import RECIPES
from tl1kernels.train.report import TITLES, Result, Row, measures

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZES = {
    "accuracy": "test accuracy, %",
    "flops": "FLOPs left, %",
    "parameters": "parameters left, %",
}


@contextmanager
def _figure(path: Path, command: str, columns: int, **options: Any) -> Iterator[Sequence[Axes]]:
    """Give out axes side by side, or below each other; then write them to `path`."""
    rows = options.pop("rows", 1)
    size = options.pop("figsize", (4.8 * columns, 4.2))
    figure, axes = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, **options
    )
    yield list(axes.flat)
    figure.savefig(path, dpi=110, metadata={"Description": command})
    plt.close(figure)


def curves(points: Sequence[Row], dataset: str, path: Path, command: str) -> None:
    """Fig. 4: accuracy against parameters and FLOPs, a line a method, a point a lam."""
    floor = max(row["accuracy"] for row in points) - 15
    with _figure(path, command, 2, sharey=True) as axes:
        for ax, size in zip(axes, ("parameters", "flops"), strict=True):
            for method in TITLES:
                mine = sorted(
                    (row for row in points if row["method"] == method), key=lambda row: row[size]
                )
                if mine:
                    ax.errorbar(
                        [row[size] for row in mine],
                        [row["accuracy"] for row in mine],
                        yerr=[row["accuracy_std"] for row in mine],
                        marker="o",
                        capsize=2,
                        label=TITLES[method],
                        linestyle="none" if method == "none" else "-",
                    )
            ax.set(xscale="log", xlabel=f"{SIZES[size]} (log scale)")
            ax.set_ylim(floor, min(100.0, floor + 17))
            ax.grid(alpha=0.3)
        axes[0].set(ylabel=SIZES["accuracy"])
        axes[0].set_title(f"{RECIPES[dataset].title}: accuracy against size as lam grows")
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def filters(models: Mapping[str, Path], path: Path, command: str) -> None:
    """Fig. 6: each model's first layer; zero weights are white, dead filters crossed out.

    A convolution's filters side by side; of a linear layer its matrix, a column a neuron.
    """
    with _figure(path, command, 1, rows=len(models), figsize=(8, 0.9 * len(models))) as axes:
        for (method, file), ax in zip(models.items(), axes, strict=True):
            state = torch.load(file, weights_only=True)
            first: Tensor = next(tensor for tensor in state.values() if tensor.ndim > 1)
            planes = first.flatten(0, 1) if first.ndim == 4 else first.unsqueeze(2)
            n, height, width = planes.shape
            strip = torch.cat([planes, torch.full((n, height, 1), float("nan"))], 2)
            strip = strip.permute(1, 0, 2).reshape(height, -1)[:, :-1]
            limit = float(planes.abs().max()) or 1.0
            ax.imshow(strip.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
            ax.set_aspect("equal" if first.ndim == 4 else "auto")
            for index in planes.flatten(1).eq(0).all(1).nonzero().flatten().tolist():
                left = index * (width + 1) - 0.5
                for ends in ((-0.5, height - 0.5), (height - 0.5, -0.5)):
                    ax.plot([left, left + width], ends, color="black", linewidth=0.8)
            ax.set_ylabel(TITLES[method], rotation=0, ha="right", va="center")
            ax.set(xticks=[], yticks=[])
        axes[0].figure.suptitle("First layer (white: zero, crossed out: removed)")


def boxplots(results: Sequence[Result], dataset: str, path: Path, command: str) -> None:
    """Fig. 3: the spread of accuracy, FLOPs and parameters over the runs of each method."""
    methods = [m for m in TITLES if any(r["setting"]["method"] == m for r in results)]
    with _figure(path, command, 3, figsize=(12, 4.2)) as axes:
        for ax, name in zip(axes, SIZES, strict=True):
            values = [
                [measures(r)[name] for r in results if r["setting"]["method"] == method]
                for method in methods
            ]
            ax.boxplot(values, orientation="horizontal")
            titles = [TITLES[method] for method in methods]
            ax.set_yticks(range(1, len(methods) + 1), titles if ax is axes[0] else [])
            ax.invert_yaxis()
            ax.set(xlabel=SIZES[name], xscale="linear" if name == "accuracy" else "log")
            ax.grid(alpha=0.3)
        axes[1].set_title(f"{RECIPES[dataset].title}: {len(values[0])} runs of each method")


def histories(results: Sequence[Result], dataset: str, path: Path, command: str) -> list[Row]:
    """Fig. 5: test accuracy against iterations, the mean over runs; return what it shows."""
    rows: list[Row] = []
    with _figure(path, command, 1, figsize=(7, 4.5)) as (ax,):
        for method in TITLES:
            mine = [result for result in results if result["setting"]["method"] == method]
            if not mine:
                continue
            # Runs may stop before others: the mean is of as long as all of them ran.
            length = min(len(result["history"]) for result in mine)
            table = np.array([[h["accuracy"] for h in r["history"][:length]] for r in mine])
            steps = mine[0]["iterations_per_epoch"] * np.arange(1, length + 1)
            ax.plot(steps, 100 * table.mean(0), label=TITLES[method])
            rows += [
                {"method": method, "iteration": int(step), "accuracy": 100 * float(value)}
                for step, value in zip(steps, table.mean(0), strict=True)
            ]
        best = max(row["accuracy"] for row in rows)
        ax.set(xlabel="iterations", ylabel=SIZES["accuracy"], ylim=(best - 25, min(best + 2, 100)))
        ax.set_title(f"{RECIPES[dataset].title}: accuracy as training goes on")
        ax.grid(alpha=0.3)
        ax.legend()
    return rows


def shapes(points: Sequence[Row], dataset: str, path: Path, command: str) -> None:
    """Fig. 7: accuracy, FLOPs and parameters of integrated TL1 against the shape a."""
    with _figure(path, command, 3, figsize=(12, 3.8)) as axes:
        for ax, name in zip(axes, SIZES, strict=True):
            values = [row[name] for row in points]
            ax.errorbar(
                [row["a"] for row in points],
                values,
                yerr=[row[f"{name}_std"] for row in points],
                marker="o",
                capsize=2,
            )
            ax.set(xscale="log", xlabel="a (log scale)", ylabel=SIZES[name])
            ax.grid(alpha=0.3)
        axes[1].set_title(
            f"{RECIPES[dataset].title}: integrated TL1 at lam = {points[0]['lam']:g}, "
            f"{points[0]['seeds']} runs each"
        )


TL1_CONTOURS: Mapping[str, Mapping[str, Any]] = {
    "l1": {"penalty": "l1"},
    **{f"TL1, a = {a:g}": {"penalty": "tl1", "a": a} for a in (100.0, 1.0, 0.1, 0.01)},
}
"""Fig. 1: TL1 is between l1 and l0."""
GROUP_CONTOURS: Mapping[str, Mapping[str, Any]] = {
    TITLES[name]: {**tk.PRESETS[name], "a": 1.0}
    for name in ("group_lasso", "sparse_group_lasso", "cges", "integrated_tl1")
}
"""Fig. 2: the regularizers of a group of two weights, both terms with the same share."""


def contours(of: Mapping[str, Mapping[str, Any]], path: Path, command: str) -> None:
    """Figs. 1 and 2: contours of regularizers of two weights, which make one group."""
    side = np.linspace(0, 1, 41)
    both = np.concatenate([-side[:0:-1], side])
    with _figure(path, command, len(of), figsize=(2.6 * len(of), 3), sharey=True) as axes:
        for ax, (title, options) in zip(axes, of.items(), strict=True):
            options = {**options, "mu": None if options.get("group_by") else 1.0}
            options["group_by"] = 0 if options.get("group_by") else None
            quarter = np.array(
                [[tk.penalty_value(torch.tensor([[x, y]]), lam=1.0, **options) for x in side]
                 for y in side]
            )  # fmt: skip
            half = np.concatenate([quarter[:, :0:-1], quarter], 1)
            ax.contour(both, both, np.concatenate([half[:0:-1], half]), levels=9)
            ax.set(title=title, aspect="equal", xlabel="w1")
        axes[0].set(ylabel="w2")
