"""The backend "cuda": the kernels of csrc/cuda, and why they are not there where they are not.

A batch is two launches: each tensor's numbers (csrc/cuda/prepare.h), unless they are the last
step's, then all its weights (csrc/cuda/tiles.h). TL1KERNELS_CUDA=emulated runs the same kernels on
CPU tensors, slowly, where the library for that was built: for tests.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tl1kernels.backends import cuda_schedule as schedule
from tl1kernels.backends import gpu, native
from tl1kernels.backends.gpu import Step
from tl1kernels.batch import Batch, state_dtype, unknown_to

ENVIRONMENT = "TL1KERNELS_CUDA"
REPORT = "cuda_build.txt"

POST = 4
"""Bytes of what one block leaves for another in one access: csrc/cuda/posts.h."""
OWN_LAUNCHES = 2**31
"""Launches that the GPU counts; from there on are the numbers of those without `prepare`."""


def emulated() -> bool:
    """Return whether the kernels run on the host, on CPU tensors."""
    return os.environ.get(ENVIRONMENT) == "emulated"


def unavailable() -> str | None:
    """Return why the kernels cannot be used here; None if they can."""
    if not emulated() and not torch.cuda.is_available():
        return f"no GPU that torch can use, and {ENVIRONMENT} is not emulated"
    if not emulated() and torch.version.cuda is None:
        return "torch's GPU is not one of CUDA's"
    if reason := native.why_not(load):
        return reason
    return _problem_with(0 if emulated() else torch.cuda.current_device())


@cache
def _problem_with(index: int) -> str | None:
    """Return why the kernels cannot run on a GPU, by torch's number; None if they can."""
    load()
    problem = torch.ops.tl1kernels.cuda_problem(index)
    return f"{problem} ({build_info()})" if problem else None


@cache
def load() -> Path:
    """Load the library once and return its path; its ops are then in torch.ops.tl1kernels.

    Raises:
        FileNotFoundError: it was not built; the message says why.
        OSError: it was built but does not load beside this torch.
    """
    return native.load_library(f"libtl1kernels_cuda{'_emulated' if emulated() else ''}.so", REPORT)


def build_info() -> str:
    """Return how the kernels were built at install time, or why they were not."""
    report = native.installed(REPORT)
    built = report.read_text().strip() if report else "not built"
    return f"{built}; the host emulates them" if emulated() else built


@cache
def penalties() -> frozenset[str]:
    """Return the names of the penalties that the library has."""
    load()
    return frozenset(torch.ops.tl1kernels.cuda_penalty_names().split())


@cache
def _scalar_names() -> tuple[str, ...]:
    load()
    return tuple(torch.ops.tl1kernels.cuda_scalar_names().split())


def rejects(batch: Batch) -> str | None:
    """Return why the kernels cannot run this batch; None if they can."""
    if unknown := unknown_to(batch, {"cpu" if emulated() else "cuda"}, penalties()):
        return unknown
    # Of several GPUs the current one, of which `unavailable` asks, may be another.
    if problem := _problem_with(batch.device.index or 0):
        return f"on {batch.device}: {problem}"
    for view in gpu.views(batch):
        if view.grouped and max(view.outer, view.inner, view.n_groups) > 2**30:
            return "more than 2^30 groups, or rows or weights of one"
    return gpu.rejects(batch)


def run(batch: Batch) -> None:
    """Take one step on every entry, in place."""
    gpu.run(batch, step, _scalar_names(), Kept)


@dataclass
class Kept(gpu.Kept):
    """What a batch's next step finds again; see `gpu.Kept`.

    Attributes:
        schedule: the lists of work, of which `resident` and `split` are on the device.
        records: on the device, each tensor's numbers, which `prepare` makes of its scalars.
        prepared: the scalars of which they were made; None where each step makes its own.
        posts: on the device, what blocks leave for each other: counters, the pieces' measures, and
            from `factors_at` on what becomes of groups.
        graphs: whether a graph has captured a step.
        launches: made without `prepare`, counted from 0.
    """

    schedule: schedule.Schedule = field(init=False)
    resident: Tensor = field(init=False)
    split: Tensor = field(init=False)
    records: Tensor = field(init=False)
    prepared: Tensor | None = field(init=False, default=None)
    posts: Tensor = field(init=False)
    factors_at: int = field(init=False)
    graphs: bool = field(init=False, default=False)
    launches: int = field(init=False, default=-1)


def step(of: Step, kept: Kept) -> None:
    """Launch the kernels on the current device. The scalars' columns are `cuda_scalar_names`.

    Raises:
        RuntimeError: the device has no room for the blocks; nothing has changed then.
    """
    load()
    gpu.renew(of, kept, _make_schedule, _scalar_names().index("step"))
    work, device = kept.schedule, of.device
    on_gpu = device.type == "cuda"
    launch = _launch_number(of, kept)
    torch.ops.tl1kernels.cuda_step_(
        kept.table,
        kept.scalars,
        kept.records,
        kept.posts,
        kept.resident,
        kept.split,
        kept.one if of.grad_scale is None else of.grad_scale,
        kept.zero if of.found_inf is None else of.found_inf,
        *_names(of),
        of.maximize,
        of.nesterov,
        of.decoupled,
        of.seed or 0,
        launch,
        kept.factors_at,
        work.parts,
        work.outcomes,
        work.waiting,
        work.piece,
        work.most_pieces,
        torch.cuda.current_device() if on_gpu else 0,
        torch.cuda.current_stream(device).cuda_stream if on_gpu else 0,
    )
    if launch == 0 and not _varies(of, kept):
        kept.prepared = of.scalars


def _launch_number(of: Step, kept: Kept) -> int:
    """Return 0 for a step that must prepare each tensor's numbers, else a number of its own.

    They stay as they are where nothing on the device goes into them, unless a graph, which
    prepares its own with each replay, has come between.
    """
    if gpu.capturing(of.device):
        kept.graphs = True
    if (
        _varies(of, kept)
        or kept.graphs
        or len(kept.schedule.split)
        or kept.prepared is not of.scalars
    ):
        kept.prepared = None  # until the step has been launched
        return 0
    kept.launches = (kept.launches + 1) % OWN_LAUNCHES
    return OWN_LAUNCHES + kept.launches


def _varies(of: Step, kept: Kept) -> bool:
    """Return whether each step prepares numbers of its own."""
    from_device = (of.counters, *kept.there, of.grad_scale, of.found_inf, of.seed)
    return any(x is not None for x in from_device)


def _names(of: Step) -> tuple[str, str, str, str | None]:
    """Return what chooses the kernel: both dtypes, the rule, the penalty."""
    dtype, grad_dtype = (str(t.dtype).removeprefix("torch.") for t in (of.params[0], of.grads[0]))
    return ("" if of.seed is None else "stochastic_") + dtype, grad_dtype, of.rule, of.penalty


def _make_schedule(of: Step, aligned: list[bool], kept: Kept) -> NDArray[np.void]:
    """Make the lists of work and the workspace; return the table's columns from ADDRESSES on."""
    ops, device, dtype = torch.ops.tl1kernels, of.device, of.params[0].dtype
    arithmetic = state_dtype(dtype)
    coupled = of.penalty is not None and of.penalty in ops.cuda_coupled_names().split()
    vector = 16 // dtype.itemsize
    make = partial(
        schedule.make_schedule,
        *(of.views, aligned, vector, arithmetic.itemsize),
        coupled=coupled,
        shared_bytes=partial(ops.cuda_shared_bytes, *_names(of)),
    )
    work = make(schedule.BLOCKS_AT_ONCE)
    if work.most_pieces > 1:
        index = torch.cuda.current_device() if device.type == "cuda" else 0
        shared = work.parts, work.outcomes, work.waiting, work.piece
        at_once = ops.cuda_resident_blocks(*_names(of), *shared, index)
        if work.most_pieces > at_once:
            work = make(at_once)
    kept.schedule, kept.prepared = work, None
    kept.resident = gpu.to_device(device, torch.from_numpy(work.resident))
    kept.split = gpu.to_device(device, torch.from_numpy(work.split))
    record, measure, outcome = ops.cuda_sizes(arithmetic == torch.float64, coupled)
    # Zeros: what lies between a record's numbers may be read with them.
    kept.records = torch.zeros(len(of.params) * record, dtype=torch.uint8, device=device)
    kept.factors_at = 1 + work.n_partials * measure // POST
    posts = kept.factors_at + work.n_factors * outcome // POST
    kept.posts = torch.zeros(posts, dtype=torch.int64, device=device)
    return work.layout
