"""What the benchmarks time: update rules, parameters, the paper's step, models' lists of shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tl1kernels as tk
from tl1kernels import backends
from tl1kernels.batch import state_dtype

LR, LAM, A, MU = 0.01, 0.05, 1.0, 0.5
REGULARIZER = {"lam": LAM, "a": A, "mu": MU}
RULES: dict[str, tuple[type, type, dict[str, Any], int]] = {
    "SGD": (tk.ProxSGD, torch.optim.SGD, {}, 0),
    "SGD momentum": (tk.ProxSGD, torch.optim.SGD, {"momentum": 0.9}, 1),
    "AdamW": (tk.ProxAdamW, torch.optim.AdamW, {}, 2),
}
"""By name: our optimizer, torch's, their options, and the number of states a weight has."""

PEER = "torch fused"
"""What ours is timed against: torch's optimizer of the same name, fused=True, without a prox."""

Step = Callable[[], Any]
Shape = tuple[int, ...]


def fresh(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Return a parameter like a trained layer's, with a gradient."""
    p = torch.randn(shape, device=device).mul_(0.05).to(dtype).requires_grad_()
    p.grad = torch.randn(shape, device=device).mul_(0.01).to(dtype)
    return p


def step_bytes(rule: str | None, params: Iterable[Tensor]) -> int:
    """Return what must be moved, each thing once.

    A step reads and writes parameter and state, and reads the gradient; None, the prox alone in
    place, reads and writes the parameter.
    """
    moved = 0
    for p in params:
        state = 0 if rule is None else 2 * RULES[rule][3] * state_dtype(p.dtype).itemsize
        moved += p.numel() * ((2 if rule is None else 3) * p.element_size() + state)
    return moved


def step_of(rule: str, p: Tensor, **regularizer: Any) -> Step:
    """Return our step on one parameter."""
    ours, _, options, _ = RULES[rule]
    return ours([p], lr=LR, **options, **regularizer).step


def steps_on_one_memory(
    rule: str, given: list[Any], torchs_way: str = "fused", **regularizer: Any
) -> tuple[Step, Step]:
    """Return our step and torch's, fused or foreach, on the same parameters, gradients and state.

    How fast memory is differs from one allocation to the next, by more than the two steps do.
    """
    ours, torchs, options, _ = RULES[rule]
    mine = ours(given, lr=LR, **options, **regularizer)
    mine.step()
    params = [p for group in mine.param_groups for p in group["params"]]
    theirs = torchs(params, lr=LR, **{torchs_way: True}, **options)
    for p in params:
        theirs.state[p] = dict(mine.state[p])
    return mine.step, theirs.step


@torch.no_grad()
def eager_step(p: Tensor, g: Tensor) -> None:
    """Take the step as a user would type it from the paper: SGD, eq. 11, group lasso on rows."""
    tau, c = LR * LAM * MU, LR * LAM * (1 - MU)
    v = p - LR * g
    if tau <= A * A / (2 * (A + 1)):
        threshold = tau * (A + 1) / A
    else:
        threshold = math.sqrt(2 * tau * (A + 1)) - A / 2
    size = v.abs()
    phi = torch.arccos((1 - 27 * tau * A * (A + 1) / (2 * (A + size) ** 3)).clamp(-1, 1))
    t = v.sign() * (2 / 3 * (A + size) * torch.cos(phi / 3) - 2 * A / 3 + size / 3)
    t = torch.where(size <= threshold, 0.0, t)
    norm = t.norm(dim=1, keepdim=True)
    p.copy_(t * torch.where(norm > 0, (1 - c / norm).clamp(min=0), 0.0))


def resnet50() -> list[Shape]:
    """Return the shapes of a ResNet-50's 161 parameters (He et al. 2016)."""

    def block(channels: int, width: int) -> Iterator[Shape]:
        yield from ((width, channels, 1, 1), (width,), (width,))
        yield from ((width, width, 3, 3), (width,), (width,))
        yield from ((4 * width, width, 1, 1), (4 * width,), (4 * width,))

    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(depth):
            shapes += block(channels, width)
            if i == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2_small() -> list[Shape]:
    """Return the shapes of a GPT-2 small's 148 parameters (Radford et al. 2019), its head tied."""
    return [(50257, 768), (1024, 768), *_transformer(768, 12)]


def vit_b_16() -> list[Shape]:
    """Return the shapes of a ViT-B/16's 152 parameters (Dosovitskiy et al. 2021), 1,000 classes."""
    stem: list[Shape] = [(1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768)]
    return [*stem, *_transformer(768, 12), (1000, 768), (1000,)]


def _transformer(width: int, depth: int) -> list[Shape]:
    """Return the shapes of a transformer's layers and of the norm behind them."""
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp: list[Shape] = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*(depth * [*norm, *attention, *norm, *mlp]), *norm]


MODELS: dict[str, Callable[[], Sequence[Shape]]] = {
    "ResNet-50": resnet50,
    "ViT-B/16": vit_b_16,
    "GPT-2 small": gpt2_small,
}
"""Models' lists of shapes."""


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        name: what the report calls it.
        rule: a name of `RULES`; None for the prox alone, in place.
        options: the regularizer's.
        shapes: of the tensors that one call takes.
        dtype: of the tensors.
        zeros: the share of weights that are 0.
        axis, at: of a case of growth, what grows and how far; "" for the others.
        threads: of the CPU; None for all.
    """

    name: str
    rule: str | None
    options: Mapping[str, Any]
    shapes: tuple[Shape, ...]
    dtype: torch.dtype = torch.float32
    zeros: float = 0.0
    axis: str = ""
    at: int = 0
    threads: int | None = None


def regularizer(penalty: str) -> dict[str, Any]:
    """Return options of a penalty with groups that are rows, and the penalty's own shape."""
    # A group's l1 norm is as large as its weights are many.
    lam = LAM / (100 if tk.PENALTIES[penalty].coupled else 1)
    return {"lam": lam, "mu": MU, "group_by": "out", "penalty": penalty}


def cases(side: int) -> Iterator[Case]:
    """Yield what is timed: one thing varied at a time, from SGD with TL1 and rows on."""
    square = ((side, side),)
    rows = {**REGULARIZER, "group_by": "out"}
    yield Case("prox alone, rows", None, rows, square)
    for rule in RULES:
        yield Case(f"{rule}, rows", rule, rows, square)
    yield Case("SGD, columns", "SGD", {**rows, "group_by": "in"}, square)
    yield Case("SGD, no groups", "SGD", {**rows, "group_by": None}, square)
    yield Case("SGD, rows, bfloat16", "SGD", rows, square, torch.bfloat16)
    yield Case("SGD, rows, 95 % zeros", "SGD", rows, square, zeros=0.95)
    for penalty in tk.PENALTIES:
        if penalty != "tl1":
            yield Case(f"SGD, rows, {penalty}", "SGD", regularizer(penalty), square)
    for rule in ("SGD", "AdamW"):
        yield Case(f"{rule}, a ResNet-50's 161 tensors", rule, REGULARIZER, tuple(resnet50()))


def growth(side: int, device: str) -> Iterator[Case]:
    """Yield what shows how cost grows: with weights, with tensors, with the CPU's threads."""
    rows = {**REGULARIZER, "group_by": "out"}
    for n in (*(1 << k for k in range(5, (side - 1).bit_length())), side):
        yield Case(f"SGD, rows, {n}x{n}", "SGD", rows, ((n, n),), axis="weights", at=n * n)
    for n in (1, 10, 100, 1000, 2000):
        yield Case(f"SGD, {n} x 16x16", "SGD", rows, ((16, 16),) * n, axis="tensors", at=n)
    if device == "cpu":
        for n in sorted({1, 2, torch.get_num_threads()}):
            case = Case(f"SGD, rows, threads: {n}", "SGD", rows, ((side, side),))
            yield Case(**{**vars(case), "axis": "threads", "at": n, "threads": n})


def sides(case: Case, device: str) -> dict[str, Step]:
    """Return what is called in turn, on one memory; torch's is lacking for the prox alone."""
    params = _params(case, case.shapes, device)
    if case.rule is None:
        (p,) = params
        v = p.detach()
        return {"ours": lambda: tk.prox_(v, LR, **case.options)}
    ours, theirs = steps_on_one_memory(case.rule, list(params), **case.options)
    return {"ours": ours, PEER: theirs}


def _params(case: Case, shapes: Iterable[tuple[int, ...]], device: str) -> list[Tensor]:
    """Return new parameters with gradients; of both the case's share is zeros."""
    params = [fresh(shape, case.dtype, device) for shape in shapes]
    with torch.no_grad():
        for p in params if case.zeros else ():
            alive = torch.rand_like(p) >= case.zeros
            p.mul_(alive)
            if p.grad is not None:
                p.grad.mul_(alive)
    return params


def disagreement(case: Case, device: str) -> str:
    """Return how two steps differ from the reference's; "" if they do not.

    On tensors of at most some 600 a dim, which still take the paths of large ones.
    """
    seed = int(torch.randint(2**31, ()))
    shapes = [tuple(min(n, 600 + 7 * i) for i, n in enumerate(s)) for s in case.shapes[:20]]
    results = []
    for backend in (None, "reference"):
        with torch.random.fork_rng(devices=[] if device == "cpu" else None):
            torch.manual_seed(seed)
            params = _params(case, shapes, device)
        if case.rule is None:
            with backends.use_backend(backend or backends.asked_for()):
                results.append([tk.prox(params[0].detach(), LR, **case.options)])
            continue
        ours, _, options, _ = RULES[case.rule]
        step = ours(params, lr=LR, **options, **case.options).step
        with backends.use_backend(backend or backends.asked_for()):
            step()
            step()
        results.append([p.detach() for p in params])
    for got, want in zip(*results, strict=True):
        near = (got - want).abs() <= 8 * torch.finfo(case.dtype).eps * want.abs().max()
        far = ~near  # a NaN is not near
        # A penalty that jumps may take a weight at its threshold either way.
        either_way = far & ((got == 0) != (want == 0))
        if (far & ~either_way).any() or either_way.sum() > 3:
            return f"{int(far.sum())} of {far.numel()} weights are not the reference's"
    return ""
