"""The backend "cpu": the library built from csrc, and why it is not there where it is not.

The step is one op, torch.ops.tl1kernels.step_; csrc/library.cpp has its schema.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import library as torch_library

import tl1kernels
from tl1kernels.batch import Batch, gradients, needs_torch, scalar_table, tensors, unknown_to

BINARY = "libtl1kernels_cpu.so"
REPORT = "native_build.txt"
ENVIRONMENT = "TL1KERNELS_CPU"


def unavailable() -> str | None:
    """Return why the library cannot be used here; None if it can."""
    return why_not(load)


def why_not(load: Callable[[], object]) -> str | None:
    """Return what keeps a library from being loaded; None if `load` does it."""
    try:
        load()
    except OSError as error:  # FileNotFoundError too
        return f"{error}: {error.__cause__}" if error.__cause__ else str(error)
    return None


@cache
def load() -> Path:
    """Load the library once and return its path; its ops are then in torch.ops.tl1kernels.

    Raises:
        FileNotFoundError: it was not built; the message says why.
        OSError: it was built but does not load beside this torch.
    """
    library = load_library(BINARY, REPORT)
    torch_library.register_fake("tl1kernels::step_", _fake_step)
    return library


def load_library(name: str, report_name: str) -> Path:
    """Load a library of ops that was installed with the package, and return its path.

    Args:
        name: of the library's file.
        report_name: of the file that says why there is none.

    Raises:
        FileNotFoundError: it was not built; the message says why.
        OSError: it was built but does not load beside this torch.
    """
    library = installed(name)
    if library is None:
        report = installed(report_name) or installed(REPORT)
        why = report.read_text().strip() if report else "the package was not installed by pip"
        raise FileNotFoundError(f"not built: {why}")
    torch.ops.load_library(str(library))
    return library


def _fake_step(params: list[Tensor], grads: list[Tensor], *_: object) -> None:
    for param, grad in zip(params, grads, strict=True):
        torch._check(param.device == grad.device, lambda: "params and grads must share a device")


def build_info() -> str:
    """Return the library's own words about how it was built, and the instruction set it uses."""
    load()
    ops = torch.ops.tl1kernels
    used = unknown_build() or f"{ops.cpu_build()} of {ops.cpu_builds()}"
    return f"{ops.build_info()}; {used}"


def unknown_build() -> str | None:
    """Return what is wrong with the variable that chooses an instruction set; None if nothing is.

    The op refuses it too, but with its place in the source before the sentence.
    """
    asked = os.environ.get(ENVIRONMENT)
    if not asked or asked in (builds := torch.ops.tl1kernels.cpu_builds().split()):
        return None
    names = ", ".join(map(repr, builds))
    return f"{ENVIRONMENT} must be one of {names} on this processor, got {asked!r}"


def rejects(batch: Batch) -> str | None:
    """Return why the library cannot run this batch; None if it can.

    Raises:
        RuntimeError: TL1KERNELS_CPU names no instruction set that this processor can run.
    """
    if unknown := unknown_to(batch, {"cpu"}, penalties()):
        return unknown
    if wrong := unknown_build():
        raise RuntimeError(wrong)  # a wish that cannot be met: no other backend may take over
    for entry in batch.entries:
        if entry.terms.scale is not None or isinstance(entry.scalars["lr"], Tensor):
            return "lr or lam on a device"
    return needs_torch(batch)


def run(batch: Batch) -> None:
    """Take one step on every entry, in place."""
    if batch.found_inf is not None and batch.found_inf.item():
        return
    if not batch.tables:
        batch.tables.update(_tables(batch))
    if not batch.numbers:
        batch.numbers["scalars"] = scalar_table(batch, _scalar_names())
    tables, rule = batch.tables, batch.rule
    grads = gradients(batch)
    torch.ops.tl1kernels.step_(
        tables["params"],
        grads,
        tables["state"],
        tables["views"],
        batch.numbers["scalars"],
        rule.name,
        batch.penalty,
        rule.maximize,
        rule.nesterov,
        rule.decoupled,
        1.0 if batch.grad_scale is None else batch.grad_scale.item(),
        tables["copies"],
        batch.seed,
    )
    # An op of the stable ABI does not say what it wrote to; autograd must know.
    torch.autograd.graph.increment_version(tables["written"])


def _tables(batch: Batch) -> dict[str, Any]:
    """Return what the op takes besides gradients; see its schema in csrc/library.cpp."""
    names = (*batch.rule.state, *batch.rule.counters)
    views = [(e.view.blocks, e.view.outer, e.view.groups, e.view.inner) for e in batch.entries]
    return {
        **tensors(batch),
        "state": [entry.state[name] for entry in batch.entries for name in names],
        "views": torch.tensor(views, dtype=torch.int64, device="cpu"),
    }


@cache
def _scalar_names() -> tuple[str, ...]:
    return tuple(torch.ops.tl1kernels.scalar_names().split())


@cache
def penalties() -> frozenset[str]:
    """Return the names of the penalties that the library has."""
    load()
    return frozenset(torch.ops.tl1kernels.penalty_names().split())


def installed(name: str) -> Path | None:
    """Return the path of a file that was built with the package; None if there is none."""
    # An editable install keeps built files in site-packages and sources elsewhere; both are in
    # the package's path.
    for folder in tl1kernels.__path__:
        if (candidate := Path(folder) / name).exists():
            return candidate
    return None
