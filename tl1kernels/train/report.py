"""The paper's tables from results: summaries, ranks, findings; as text, CSV and JSON."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata

from tl1kernels.train.recipes import RECIPES
from tl1kernels.train.run import OPTIONS, Setting, diverged, environment

Result = dict[str, Any]
Row = dict[str, Any]

TITLES = {
    "none": "no penalty",
    **{method: method for method in OPTIONS},
    "group_lasso": "group lasso",
    "sparse_group_lasso": "sparse group lasso",
    "cges": "CGES",
    "tl1": "TL1",
    "integrated_tl1": "integrated TL1",
}
"""By method, in the order of tables and legends."""
TABLE_2 = {
    "accuracy": "accuracy\n%",
    "flops": "FLOPs\n%",
    "parameters": "parameters\n%",
}
"""Columns of the paper's Table 2, besides the average rank."""
TABLE_3 = {
    "neurons_removed": "neurons\nremoved %",
    "last_inputs_removed": "last layer:\nneurons\nremoved %",
    "last_zeros": "last layer:\nzeros among\nthe rest %",
}
"""Columns of the paper's Table 3: neurons without weights in the last layer, and what the others
lost there; before them, neurons of all layers."""
SIDE_BY_SIDE = ("group_lasso", "tl1", "integrated_tl1")
"""The methods of the paper's Table 3."""
BUDGETS = (3, 5, 7, 10, 15)
"""Shares of the parameters, in %, at which the curves of Fig. 4 are compared."""


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


def summarize(results: Sequence[Result]) -> list[Row]:
    """Return one row for each method and its options: means and standard deviations over seeds."""
    runs: dict[tuple[str, float, float], list[Result]] = {}
    for result in results:
        setting = result["setting"]
        runs.setdefault((setting["method"], setting["lam"], setting["a"]), []).append(result)
    rows = []
    for (method, lam, a), group in runs.items():
        row: Row = {"method": method, "lam": lam, "a": a, "seeds": len(group)}
        every = [measures(result) for result in group]
        for name in (*TABLE_2, *TABLE_3):
            values = [one[name] for one in every]
            row[name] = mean(values)
            row[f"{name}_std"] = stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
    order = list(TITLES)
    return sorted(rows, key=lambda row: (order.index(row["method"]), row["lam"], row["a"]))


def add_ranks(rows: Sequence[Row]) -> None:
    """Give each regularizer its average rank: over accuracy, FLOPs and parameters, 1 the best."""
    ranked = [row for row in rows if row["method"] != "none"]
    worse = [[-row["accuracy"], row["flops"], row["parameters"]] for row in ranked]
    for row, ranks in zip(ranked, rankdata(worse, axis=0) if worse else [], strict=True):
        row["average_rank"] = float(ranks.mean())


def findings(table: Sequence[Row], curves: Sequence[Row], shapes: Sequence[Row]) -> list[Row]:
    """Return what the paper claims, whether these runs show it, and the figures that say so.

    Args:
        table: of the chosen options.
        curves: the same and other lam.
        shapes: integrated TL1 with other a, which rises.
    """
    by = {row["method"]: row for row in table}
    found: list[Row] = []

    def add(claim: str, holds: bool, figures: Mapping[str, Any]) -> None:
        found.append({"claim": claim, "holds": holds, "figures": figures})

    if by.keys() >= set(SIDE_BY_SIDE):
        rows = {method: {name: by[method][name] for name in TABLE_3} for method in SIDE_BY_SIDE}
        group, single, both = rows.values()
        fewest = min(group["last_inputs_removed"], both["last_inputs_removed"])
        add(
            "Table 3: in the last layer group lasso removes neurons and no other connection, TL1 "
            "connections and few neurons, integrated TL1 both",
            group["last_zeros"] < 1 < min(single["last_zeros"], both["last_zeros"])
            and single["last_inputs_removed"] < fewest,
            rows,
        )
    if shapes:
        left, right = ([row[name] for row in shapes] for name in ("parameters", "accuracy"))
        figures = {
            f"a = {row['a']:g}": {name: row[name] for name in ("accuracy", "parameters")}
            for row in shapes
        }
        add("Fig. 7: the smaller a, the fewer parameters", left == sorted(left), figures)
        add(
            "Fig. 7: an a between the smallest and the largest is the most accurate",
            max(right[1:-1], default=0.0) > max(right[0], right[-1]),
            figures,
        )
    for other in ("sparse_group_lasso", "cges"):
        if by.keys() >= {"integrated_tl1", other}:
            ours, theirs = best_within(curves, "integrated_tl1"), best_within(curves, other)
            add(
                "Fig. 4: within each budget of parameters up to 15 % that it meets, the best "
                f"accuracy of integrated TL1 is above that of {TITLES[other]}",
                any(ours.values())
                and all(best > theirs[budget] for budget, best in ours.items() if best),
                {
                    f"at most {budget} % of the parameters": {
                        "integrated_tl1": ours[budget] or None,
                        other: theirs[budget] or None,
                    }
                    for budget in BUDGETS
                },
            )
    return found


def best_within(curves: Sequence[Row], method: str) -> dict[int, float]:
    """Return a method's best mean accuracy within each budget; 0 where no row meets it."""
    mine = [row for row in curves if row["method"] == method]
    return {
        budget: max((r["accuracy"] for r in mine if r["parameters"] <= budget), default=0.0)
        for budget in BUDGETS
    }


def plain_table(title: str, headers: Sequence[str]) -> Table:
    """Return an empty table that fits into 80 columns; the first column is on the left."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    return table


def print_tables(rows: Sequence[Row], dataset: str, console: Console) -> None:
    """Print Tables 2 and 3: mean ± standard deviation over the seeds, or the figures of one run."""
    seeds = rows[0]["seeds"]
    of = "one run" if seeds == 1 else f"mean ± standard deviation of {seeds} runs"
    title = f"{RECIPES[dataset].title}, test split: {of} (Table 2)"
    rank = [f"{row['average_rank']:.1f}" if "average_rank" in row else "" for row in rows]
    _print_table(title, rows, TABLE_2, {"average\nrank": rank}, console)
    _print_table("The same runs' neurons (Table 3)", rows, TABLE_3, {}, console)


def _print_table(
    title: str,
    rows: Sequence[Row],
    columns: Mapping[str, str],
    more: Mapping[str, Sequence[str]],
    console: Console,
) -> None:
    table = plain_table(title, ["method", "lam", "a", *columns.values(), *more])
    for row, *last in zip(rows, *more.values(), strict=True):
        cells = [
            f"{row[name]:.1f}" + (f" ±{row[name + '_std']:.1f}" if row["seeds"] > 1 else "")
            for name in columns
        ]
        table.add_row(TITLES[row["method"]], f"{row['lam']:g}", f"{row['a']:g}", *cells, *last)
    console.print(table)


def print_findings(found: Sequence[Row], console: Console) -> None:
    """Print each claim of the paper and whether it holds here."""
    for one in found:
        console.print(f"{'holds' if one['holds'] else 'does NOT hold':>14}: {one['claim']}")


def print_diverged(results: Sequence[Result], console: Console) -> None:
    """Print which runs diverged, if any did: their measures say nothing of a method."""
    lost = [result["setting"] for result in results if diverged(result["history"])]
    if lost:
        console.print(f"{len(lost)} of {len(results)} runs diverged, at too large a step size:")
    for of in lost:
        title = TITLES[of["method"]]
        console.print(f"  {title}, lam {of['lam']:g}, a {of['a']:g}, seed {of['seed']}")


def copy_models(out: Path, table: Sequence[Result]) -> dict[str, Path]:
    """Copy each method's state_dict of median accuracy to `models/<method>.pt`."""
    folder = out / "models"
    folder.mkdir(exist_ok=True)
    models = {}
    for method in TITLES:
        mine = [result for result in table if result["setting"]["method"] == method]
        if mine:
            median = sorted(mine, key=lambda result: result["accuracy"])[len(mine) // 2]
            source = out / "runs" / f"{Setting(**median['setting']).file_name}.pt"
            models[method] = Path(shutil.copyfile(source, folder / f"{method}.pt"))
    return models


def write(out: Path, name: str, command: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as `<name>.json` and `<name>.csv`, both with the command that makes them again."""
    content = {"command": command, "environment": environment(), "rows": list(rows)}
    (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*columns, "command"])
        writer.writeheader()
        writer.writerows({**row, "command": command} for row in rows)
