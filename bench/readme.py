"""Render the READMEs' tables and plots from the results under bench/results, and nothing else.

python bench/readme.py           write tables between their markers in PAGES, draw ratios.png
python bench/readme.py --check   exit with 1 if these and the results disagree
"""

import json
import re
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from PIL import Image

from tl1kernels.bench import plots
from tl1kernels.train import report
from tl1kernels.train.recipes import RECIPES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


# The data sets whose results are committed.
TRAINED = "digits", "pendigits", "mnist", "fashion_mnist"
WITH_FIGURES = TRAINED[:3]  # those with figures of lam and a, too


def table2(dataset: str) -> str:
    """Return a data set's table 2: accuracy, FLOPs, parameters, average rank."""
    return _experiment(dataset, "table2", report.TABLE_2, rank=True)


def table3(dataset: str) -> str:
    """Return a data set's table 3: which neurons and connections went."""
    return _experiment(dataset, "table3", report.TABLE_3)


def findings() -> str:
    """Return which of the paper's claims hold on each data set; nothing where that was not run."""
    titles = [RECIPES[dataset].title for dataset in WITH_FIGURES]
    lines = [_line("of the paper's claims", *titles), "|---" * (1 + len(titles)) + "|"]
    of_each = [
        {row["claim"]: row["holds"] for row in _trained(dataset, "findings")["rows"]}
        for dataset in WITH_FIGURES
    ]
    word = {True: "holds", False: "**does not hold**", None: ""}
    for claim in dict.fromkeys(claim for found in of_each for claim in found):
        lines.append(_line(claim, *(word[found.get(claim)] for found in of_each)))
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _trained(dataset: str, name: str) -> dict:
    return json.loads((RESULTS / dataset / f"{name}.json").read_text())


def _experiment(dataset: str, name: str, columns: dict[str, str], rank: bool = False) -> str:
    results = _trained(dataset, name)
    headers = [*(title.replace("\n", " ") for title in columns.values()), *["average rank"] * rank]
    lines = ["| | " + " | ".join(headers) + " |", "|---" * (len(headers) + 1) + "|"]
    for row in results["rows"]:
        cells = [f"{row[name]:.1f} ± {row[name + '_std']:.1f}" for name in columns]
        if rank:
            cells.append(f"{row['average_rank']:.1f}" if "average_rank" in row else "")
        lines.append(_line(report.TITLES[row["method"]], *cells))
    environment = results["environment"]
    seeds = results["rows"][0]["seeds"]
    lines += [
        "",
        f"{RECIPES[dataset].title}, test split, mean ± standard deviation of {seeds} runs; "
        f"`{results['command']}`, torch {environment['torch']}, {environment['machine']}.",
    ]
    return "\n".join(lines)


def _newest(of_a_gpu: bool) -> dict | None:
    reports = [json.loads(file.read_text()) for file in RESULTS.glob("*.json")]
    of_such = [report for report in reports if ("gpu" in report["environment"]) == of_a_gpu]
    return max(of_such, key=lambda report: report["date"], default=None)


def _newest_of_a_cpu() -> dict:
    found = _newest(of_a_gpu=False)
    if found is None:
        raise SystemExit("no results of a CPU in bench/results")
    return found


RATIOS = ("ratio", "lowest", "highest", "bound")


def _ratios(row: dict) -> list[str]:
    """Return a result's ratio, its ends and its bound, as they are written."""
    if row["ratio"] > 0.5:
        ratio, low, high, bound = (f"{row[name]:.2f}" for name in RATIOS)
    else:  # so much faster that the inverse reads better
        ratio, low, high, bound = (f"1 / {1 / row[name]:.1f}" for name in RATIOS)
    late = "" if row["ratio"] <= row["bound"] else " **missed**"
    return [ratio + late, f"{low}, {high}", bound]


HEADLINES = {
    *(f"{rule}, {of} 4096x4096" for rule in ("SGD", "AdamW") for of in ("rows", "columns")),
    *("SGD, rows", "SGD, l1", "the prox alone, l1"),
    *(f"SGD, group lasso, {of}" for of in ("rows", "columns")),
    "AdamW, 20 steps of 161 tensors 4x4, Python alone",
    "AdamW, a ResNet-50's 161 tensors, one param group",
    "AdamW, a GPT-2 small's 148 tensors",
}
"""The cases of a CPU that the first page shows."""


def cpu(of: Collection[str] | None = None) -> str:
    """Return the ratios of bench/test_cpu.py, all or some cases', and where they were taken."""
    timed = _newest_of_a_cpu()
    if of is not None and (unknown := {*of} - {row["case"] for row in timed["results"]}):
        raise SystemExit(f"no results of a CPU for {unknown}")
    lines = ["| step | beside | ms | ratio | from, to | bound |", "|---|---|---|---|---|---|"]
    lines += [
        _line(row["case"], row["peer"], f"{row['ours_ms']:.1f}", *_ratios(row))
        for row in timed["results"]
        if of is None or row["case"] in of
    ]
    where = timed["environment"]
    processor = f"{where['threads']} threads of an {where['processor']} ({where['instructions']})"
    lines += [
        "",
        f"float32, 4096x4096 unless it says otherwise; medians of both sides interleaved in one "
        f"process, over several allocations, of which the best and the worst ratio are beside it; "
        f"{processor}, torch {where['torch']}, copy {timed['copy_gb_per_s']:.0f} GB/s; "
        f"commit {where['commit']}.",
    ]
    return "\n".join(lines)


def gpu() -> str:
    """Return what bench/test_gpu.py measured, and where; a sentence where it never has."""
    timed = _newest(of_a_gpu=True)
    if timed is None:
        return "`bench/gpu.sh` has not yet run whole on a GPU: there is no table of its figures."
    lines = ["| step | beside | ms | GB/s | ratio | from, to | bound |", "|---" * 7 + "|"]
    for row in timed["results"]:
        rate = row["bytes"] / row["ours_ms"] / 1e6
        cells = [row["case"], row["peer"], f"{row['ours_ms']:.3f}", f"{rate:.0f}"]
        lines.append(_line(*cells, *_ratios(row)))
    where = timed["environment"]
    triton = f", Triton {where['triton']}" if "triton" in where else ""
    lines += [
        "",
        f"Medians of both sides interleaved in one process, with the best and the worst round; by "
        f"the device's clock with the L2 cache full of something else, a model's tensors ten steps "
        f"on end by the host's; {where['gpu']}, torch {where['torch']}{triton}, copy "
        f"{timed['copy_gb_per_s']:.0f} GB/s; commit {where['commit']}.",
    ]
    return "\n".join(lines)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "digits table2": partial(table2, "digits"),
        "findings": findings,
        "cpu headlines": partial(cpu, HEADLINES),
        "gpu": gpu,
    },
    "bench/results/README.md": {
        "cpu": cpu,
        "digits table3": partial(table3, "digits"),
        **{f"{dataset} table2": partial(table2, dataset) for dataset in TRAINED[1:]},
    },
}
"""The tables of each page, by the name in their markers."""


def rendered(page: str) -> str:
    """Return a page with each table between its markers made anew."""
    text = (ROOT / page).read_text()
    for name, table in PAGES[page].items():
        block = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not block.search(text):
            raise SystemExit(f"{page} has no markers for the table {name!r}")
        content = table() + "\n"
        text = block.sub(lambda m, content=content: m[1] + content + m[2], text)
    return text


RATIOS_PLOT = "ratios.png"


def stale_plots() -> list[str]:
    """Return the plots that were not drawn from the figures they should show.

    Those of `tl1kernels bench` have their JSON beside them; that of the ratios shows what the table
    does.
    """
    shown = {
        picture: json.loads(picture.with_suffix(".json").read_text())
        for picture in (RESULTS / "short").glob("*.png")
    }
    if (RESULTS / RATIOS_PLOT).exists():
        shown[RESULTS / RATIOS_PLOT] = _newest_of_a_cpu()
    stale = []
    for picture, figures in shown.items():
        with Image.open(picture) as image:
            if image.text.get("Source") != plots.digest(figures):
                stale.append(str(picture.relative_to(RESULTS)))
    return stale


def main() -> int:
    """Write or check."""
    new = {page: rendered(page) for page in PAGES}
    if "--check" in sys.argv[1:]:
        for name in (stale := stale_plots()):
            print(f"bench/results/{name} was drawn from other figures than it should show")
        disagree = [page for page, text in new.items() if text != (ROOT / page).read_text()]
        for page in disagree:
            print(f"{page} disagrees with bench/results; run python bench/readme.py")
        return int(bool(disagree or stale))
    for page, text in new.items():
        (ROOT / page).write_text(text)
    plots.draw_ratios(_newest_of_a_cpu(), RESULTS / RATIOS_PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
