"""Plots of figures: of a run of `tl1kernels bench`, and of one of the benchmarks in bench/."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def digest(report: Mapping[str, Any]) -> str:
    """Return what tells this report's figures from any others."""
    return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of what `tl1kernels bench` reports: share of the copy by case, growth."""
    cases = [row for row in report["results"] if not row["axis"]]
    axes_of = list(dict.fromkeys(row["axis"] for row in report["results"] if row["axis"]))
    figure = plt.figure(figsize=(11, 3.4 + 0.24 * len(cases)), layout="constrained")
    heights = [0.24 * len(cases) + 0.6, 2.8]
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flat
    _bars(top.subplots(), cases, report)
    for i, axis in enumerate(axes_of):
        _growth(bottom.add_subplot(1, len(axes_of), i + 1), axis, report)
    _write(figure, path, report, report["command"])


def draw_ratios(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of what bench/ reports: how many times a peer's step ours takes, by peer."""
    peers = list(dict.fromkeys(row["peer"] for row in report["results"]))
    figure, ax = plt.subplots(figsize=(11, 1.2 + 0.34 * len(peers)), layout="constrained")
    for y, peer in enumerate(peers):
        ratios = [row["ratio"] for row in report["results"] if row["peer"] == peer]
        ax.plot(ratios, [y] * len(ratios), "o", color="tab:blue", alpha=0.4, markeredgewidth=0)
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        ax.plot(mean, y, "|", color="black", markersize=16, markeredgewidth=2)
        ax.annotate(f"{mean:.2g}", (mean, y), (5, 5), textcoords="offset points", fontsize=8)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xscale("log")
    ax.set_yticks(range(len(peers)), peers)
    ax.invert_yaxis()
    ax.set_xlabel("ours, in times of the peer; each point a case, the bar their geometric mean")
    environment = report["environment"]
    where = environment.get("gpu", environment["processor"])
    ax.set_title(f"{where}, {environment['threads']} threads, {report['date']}")
    _write(figure, path, report, "python bench/readme.py")


def _write(figure: Any, path: Path, report: Mapping[str, Any], command: str) -> None:
    """Write a PNG, with the figures' digest and the command in it, as text."""
    text = {"Description": command, "Source": digest(report)}
    figure.savefig(path, dpi=110, metadata=text)
    plt.close(figure)


def _bars(ax: Any, cases: list[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    names = [row["name"] for row in cases]
    bars = ax.barh(names, [100 * row["of_copy"] for row in cases], color="tab:blue")
    beside = ["" if row["ratio"] is None else f"{row['ratio']:.2f} x torch fused" for row in cases]
    ax.bar_label(bars, beside, padding=4, fontsize=8)
    ax.axvline(100, color="black", linewidth=0.8)
    ax.margins(x=0.2)
    ax.invert_yaxis()
    where = report["environment"].get("gpu", report["environment"]["processor"])
    ax.set_title(f"{where}, backend {report['backend']}, copy {report['copy_gb_per_s']:.0f} GB/s")
    ax.set_xlabel("bytes that a step must move, per second, % of a copy's")


def _growth(ax: Any, axis: str, report: Mapping[str, Any]) -> None:
    rows = [row for row in report["results"] if row["axis"] == axis]
    at = [row["at"] for row in rows]
    ax.loglog(at, [row["ms"] for row in rows], marker="o", label="ours")
    ax.loglog(at, [row["peer_ms"] for row in rows], marker=".", label="torch fused, no prox")
    slope = report["slopes"].get(axis)
    ax.set_title("" if slope is None else f"power {slope:.2f} in the upper half", fontsize=9)
    ax.set_xlabel(axis)
    ax.set_ylabel("ms")
    ax.legend(fontsize=8)
