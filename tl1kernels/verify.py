"""Check a backend against oracles that share no code with it: `tl1kernels verify`.

Fresh random input each time; the seed that reproduces it is in the report.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl1kernels import backends, oracles
from tl1kernels.backends import triton_launch
from tl1kernels.functional import prox
from tl1kernels.optim import ProxAdam, ProxAdamW, ProxSGD
from tl1kernels.penalties import PENALTIES
from tl1kernels.plan import FLOAT_DTYPES
from tl1kernels.views import GroupBy

_CPU = torch.device("cpu")

Penalties = Sequence[str | None]

GROUPINGS = (None, "out", "in", "in_spatial", "filter_slice", "layer", -1)

RULES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "SGD": (ProxSGD, torch.optim.SGD, {}),
    "SGD, momentum": (ProxSGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
    "SGD, Nesterov, decay": (
        ProxSGD,
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True},
    ),
    "Adam": (ProxAdam, torch.optim.Adam, {}),
    "Adam, AMSGrad, decay": (
        ProxAdam,
        torch.optim.Adam,
        {"amsgrad": True, "weight_decay": 0.01, "maximize": True},
    ),
    "AdamW": (ProxAdamW, torch.optim.AdamW, {}),
}
"""Ours, torch's and the options, for the checks of whole steps."""


@dataclass(frozen=True)
class Bounds:
    """What a backend promises, by dtype, in units in the last place of |v|.

    Next to a double root, where the problem itself magnifies rounding, times that magnification.

    Attributes:
        prox: of the prox of single weights.
        step: of a whole step, groups included; |v| is the larger of the weight before and after
            the update rule.
        rule: of 20 steps with lam = 0 in float64, against torch.optim; 0 for the same bits.
    """

    prox: Mapping[torch.dtype, float]
    step: Mapping[torch.dtype, float]
    rule: float


# float64 inside and one rounding: half an ulp, but for float64 itself.
ROUNDED_ONCE = Bounds(
    prox={torch.float64: 32.0, torch.float32: 0.505},
    step={
        torch.float64: 32.0,
        torch.float32: 0.501,
        torch.bfloat16: 0.501,
        torch.float16: 0.501,
    },
    rule=0.0,
)
# The arithmetic of the state's dtype; 16 bits are that, rounded once.
NATIVE = Bounds(
    prox={torch.float64: 32.0, torch.float32: 4.0},
    step={torch.float64: 32.0, torch.float32: 8.0, torch.bfloat16: 0.51, torch.float16: 0.51},
    rule=64.0,
)
# The same with a shorter series for 16 bits, and approximate roots and quotients.
TRITON = replace(NATIVE, step={**NATIVE.step, torch.bfloat16: 0.54})
# Triton's interpreter cuts a float32 off where a GPU rounds it to bfloat16.
INTERPRETED = replace(NATIVE, step={**NATIVE.step, torch.bfloat16: 1.04})


def bounds_of(backend: str) -> Bounds:
    """Return what a backend promises on this machine."""
    if backend == "triton":
        return INTERPRETED if triton_launch.interpreting() else TRITON
    return {"reference": ROUNDED_ONCE}.get(backend, NATIVE)


@dataclass(frozen=True)
class Check:
    """One cell of the report: the largest error over `cases` values, in `unit`, and its bound."""

    section: str
    row: str
    dtype: str
    against: str
    cases: int
    error: float
    bound: float
    unit: str

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; a NaN is not."""
        return self.error <= self.bound

    @property
    def what(self) -> str:
        """What was checked, in one line."""
        return f"{self.section} {self.row}, {self.dtype}"


@dataclass(frozen=True)
class Report:
    """All checks of one backend; `print` it for a table of errors by section, row and dtype.

    `lacking` are the penalties that were not checked, since the backend does not have them.
    """

    backend: str
    seed: int
    checks: tuple[Check, ...]
    lacking: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain numbers and strings."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return {
            "backend": self.backend,
            "seed": self.seed,
            "passed": self.passed,
            "lacking": list(self.lacking),
            "checks": checks,
        }

    def __str__(self) -> str:
        lines = [f"backend {self.backend}, seed {self.seed}"]
        for section in dict.fromkeys(check.section for check in self.checks):
            lines += ["", *_table([c for c in self.checks if c.section == section])]
        passed = sum(c.passed for c in self.checks)
        if self.lacking:
            lines += [
                "",
                f"not checked, since {self.backend} lacks them: {', '.join(self.lacking)}",
            ]
        lines += ["", f"{passed} of {len(self.checks)} checks passed"]
        return "\n".join(lines)


def _table(checks: Sequence[Check]) -> Iterator[str]:
    """Yield the lines of one section: a row of errors for each thing checked, a column a dtype."""
    first = checks[0]
    cells = {(check.row, check.dtype): check for check in checks}
    rows, dtypes = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    width = max(map(len, (*rows, "bound")))
    yield f"{first.section}: largest error against {first.against}, in {first.unit}"
    yield f"  {'':{width}}" + "".join(f"{dtype:>14}" for dtype in dtypes)
    for row in rows:
        line = f"  {row:{width}}"
        for dtype in dtypes:
            cell = cells.get((row, dtype))
            text = "" if cell is None else f"{cell.error:.3g}" + ("" if cell.passed else " FAIL")
            line += f"{text:>14}"
        yield line
    bounds = [next(c.bound for c in checks if c.dtype == dtype) for dtype in dtypes]
    yield f"  {'bound':{width}}" + "".join(f"{bound:>14g}" for bound in bounds)


def verify(
    backend: str = "reference",
    seed: int | None = None,
    penalties: Penalties | None = None,
) -> Report:
    """Run every check on one backend.

    Args:
        backend: a name of `BACKENDS`; Triton runs on the GPU, unless it interprets.
        seed: of the random input; None draws one.
        penalties: names of `PENALTIES`, or None for no penalty; None for all that it has.

    Raises:
        ValueError, RuntimeError: no such backend, or it cannot run here; no such penalty.
    """
    every = (None, *PENALTIES)
    for name in penalties or ():
        if name not in every:
            raise ValueError(f"penalties must be among {every}, got {name!r}")
    backends.require(backend)
    has = {None, *backends.BACKENDS[backend].penalties()}
    for name in penalties or ():
        if name not in has:
            raise ValueError(f"backend {backend!r} has no penalty {name!r}")
    lacking = [name for name in PENALTIES if name not in has] if penalties is None else []
    chosen = [name for name in every if name in has] if penalties is None else penalties
    seed = secrets.randbelow(2**31) if seed is None else seed
    generator = np.random.default_rng(seed)
    checks: list[Check] = []
    bounds = bounds_of(backend)
    gpu = backend == "triton" and not triton_launch.interpreting()
    device = torch.device("cuda" if gpu else "cpu")
    with backends.use_backend(backend):
        for part in (_thresholds, _groups, _rules, _steps):
            checks += part(generator, bounds, device, chosen)
    return Report(backend, seed, tuple(checks), tuple(lacking))


def hard_cases(
    penalty: str, generator: np.random.Generator, n: int
) -> Iterator[tuple[float, float, float, float]]:
    """Yield random (v, step, weight, a) over the range of use, most near a kink.

    a from 1e-3 to 1e6, step * weight from 1e-10 to 1, |v| from far below the threshold to far
    above it; not where the problem itself magnifies rounding, next to a double root.
    """
    oracle = oracles.ORACLES[penalty]
    while n:
        step, weight = (float(10 ** generator.uniform(-5, 0)) for _ in range(2))
        a = random_shape(penalty, step, generator, -3, 6)
        near = 1 + generator.choice([-1, 1]) * 10 ** generator.uniform(-6, 0)
        scale = near if generator.random() < 0.7 else 10 ** generator.uniform(-3, 5)
        kink = generator.choice(oracle.kinks(step, weight, a))
        v = float(generator.choice([-1, 1]) * kink * scale)
        if v and oracle.condition(abs(v), step, weight, a) < 30:
            n -= 1
            yield v, step, weight, a


def random_shape(
    penalty: str | None, step: float, generator: np.random.Generator, low: int, high: int
) -> float:
    """Return a random shape a in [10^low, 10^high] that the penalty allows at this step size."""
    while True:
        a = float(10 ** generator.uniform(low, high))
        # With a margin: at the end of its range a prox magnifies rounding without bound.
        if penalty is None or PENALTIES[penalty].check(a, 1.1 * step) is None:
            return a


def _groupings(penalty: str | None) -> Sequence[GroupBy]:
    """Return the values of `group_by` that go with a penalty."""
    coupled = penalty is not None and PENALTIES[penalty].coupled
    return [by for by in GROUPINGS if by is not None or not coupled]


def _thresholds(
    generator: np.random.Generator, bounds: Bounds, device: torch.device, penalties: Penalties
) -> Iterator[Check]:
    """Check single weights against the definition of the prox, in float64 and float32.

    All in one step of SGD with gradients of 0, a param group for each weight.
    """
    elementwise = [name for name in penalties if name in oracles.ORACLES]
    for name, (dtype, bound) in product(elementwise, bounds.prox.items()):
        cases = list(hard_cases(name, generator, 100))
        inputs = [torch.tensor([v], dtype=dtype) for v, *_ in cases]
        groups = [
            {"lr": step, "lam": weight, "penalty": name, "a": a, "group_by": None}
            for _, step, weight, a in cases
        ]
        zeros = [torch.zeros_like(x) for x in inputs]
        errors = []
        for x, got, (_, *of) in zip(
            inputs, _step(ProxSGD, inputs, zeros, groups, device), cases, strict=True
        ):
            step, weight, a = of
            want = oracles.prox_by_definition(x.item(), step, weight, name, a)
            magnified = oracles.ORACLES[name].condition(abs(x.item()), step, weight, a)
            errors.append(_ulps(got, np.array([float(want)]), x.numpy()) / magnified)
        yield _check("prox", name, dtype, "the definition, by search", errors, bound)


def _groups(
    generator: np.random.Generator, bounds: Bounds, device: torch.device, penalties: Penalties
) -> Iterator[Check]:
    """Thresholds with groups on random tensors against eq. 22 written as loops."""
    for penalty in penalties:
        errors: list[Any] = []
        for group_by, group_weight in product(_groupings(penalty), (None, "sqrt")):
            shape = tuple(int(n) for n in generator.integers(2, 6, size=4))
            v = generator.normal(size=shape)
            options: dict[str, Any] = {
                "lam": 10 ** generator.uniform(-1, 0.5),
                "a": random_shape(penalty, 0.3, generator, -1, 1),
                "mu": generator.uniform(),
                "penalty": penalty,
                "group_by": group_by,
                "group_weight": group_weight,
            }
            layout = torch.channels_last if generator.random() < 0.5 else torch.contiguous_format
            x = torch.from_numpy(v).to(device, memory_format=layout)
            got = prox(x, 0.3, **options).cpu().numpy()
            want = oracles.prox_as_published(v, 0.3, **options)
            errors += [np.abs(got - want)]
        row = f"{penalty or 'no penalty'} + groups"
        against = "eq. 22, group by group"
        yield _check("tensors", row, torch.float64, against, errors, 1e-12, "absolute terms")


def _rules(
    generator: np.random.Generator, bounds: Bounds, device: torch.device, penalties: Penalties
) -> Iterator[Check]:
    """Check 20 steps with lam = 0 against torch.optim in float64."""
    for name, (ours, torchs, options) in RULES.items():
        start = torch.from_numpy(generator.normal(size=(7, 5)))
        gradients = [torch.from_numpy(generator.normal(size=(7, 5))) for _ in range(20)]
        got = _train(ours, start, gradients, options, device)
        want = _train(torchs, start, gradients, options)
        largest = np.full(want.shape, want.abs().max().item())
        errors = _ulps(got, want.numpy(), largest)
        unit = "ulp of the largest weight"
        section = "20 steps, lam = 0"
        yield _check(section, name, torch.float64, "torch.optim", [errors], bounds.rule, unit)


def _steps(
    generator: np.random.Generator, bounds: Bounds, device: torch.device, penalties: Penalties
) -> Iterator[Check]:
    """One whole step, every dtype, against torch.optim in float64 and then eq. 22.

    The groupings are param groups of one optimizer.
    """
    for name, penalty, dtype in product(RULES, penalties, FLOAT_DTYPES):
        ours, torchs, options = RULES[name]
        starts, gradients, groups = [], [], []
        for group_by in _groupings(penalty):
            shape = tuple(int(n) for n in generator.integers(2, 4, size=4))
            starts.append(torch.from_numpy(generator.normal(size=shape)).to(dtype))
            gradients.append(torch.from_numpy(generator.normal(size=shape)).to(dtype))
            groups.append(
                {
                    "lam": 10 ** generator.uniform(-1, 1),
                    "a": random_shape(penalty, 0.1, generator, -1, 1),
                    "mu": generator.uniform(),
                    "penalty": penalty,
                    "group_by": group_by,
                }
            )
        options = {**options, "lr": 0.1}
        results = _step(partial(ours, **options), starts, gradients, groups, device)
        for start, gradient, got, group in zip(starts, gradients, results, groups, strict=True):
            v = _train(torchs, start.double(), [gradient.double()], options).numpy()
            want = oracles.prox_as_published(v, 0.1, **group)
            # What the update rule cancels it cannot give back.
            errors = _ulps(got, want, np.maximum(np.abs(v), start.double().abs().numpy()))
            if penalty is not None and (dtype == torch.float64 or bounds is not ROUNDED_ONCE):
                terms = 0.1, group["lam"] * group["mu"]
                of = {"penalty": penalty, "a": group["a"], "group_by": group["group_by"]}
                errors = errors / oracles.condition(v, *terms, **of)
                # So near a jump v's own rounding decides on which side a weight is.
                elementwise = oracles.ORACLES.get(penalty)
                for kink in elementwise.kinks(*terms, group["a"]) if elementwise else ():
                    near = np.abs(np.abs(v) - kink) <= 4 * torch.finfo(dtype).eps * kink
                    errors = np.where(near, 0, errors)
            row = f"{penalty or 'no penalty'}, group_by={group['group_by']}"
            against, bound = "torch.optim, then eq. 22", bounds.step[dtype]
            yield _check(f"step {name}", row, dtype, against, [errors], bound)


def _check(
    section: str,
    row: str,
    dtype: torch.dtype,
    against: str,
    errors: Sequence[Any],
    bound: float,
    unit: str = "ulp of |v|",
) -> Check:
    every = np.concatenate([np.ravel(error) for error in errors])
    largest = float(every.max())  # a NaN is its own max
    return Check(section, row, _name(dtype), against, every.size, largest, bound, unit)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _train(
    kind: Callable[..., torch.optim.Optimizer],
    start: Tensor,
    gradients: list[Tensor],
    options: dict[str, Any],
    device: torch.device = _CPU,
) -> Tensor:
    """Return `start` after a step on the device for each gradient."""
    param = start.to(device, copy=True).requires_grad_()
    optimizer = kind([param], **options)
    for gradient in gradients:
        param.grad = gradient.to(device, copy=True)
        optimizer.step()
    return param.detach().cpu()


def _step(
    kind: Callable[..., torch.optim.Optimizer],
    starts: Sequence[Tensor],
    gradients: Sequence[Tensor],
    groups: Sequence[Mapping[str, Any]],
    device: torch.device,
) -> list[Tensor]:
    """Return what each tensor is after one step on the device, with a param group of its own."""
    params = [start.to(device, copy=True).requires_grad_() for start in starts]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.to(device, copy=True)
    kind([{"params": [p], **group} for p, group in zip(params, groups, strict=True)]).step()
    return [param.detach().cpu() for param in params]


def _ulps(got: Tensor, want: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return |got - want| in units in the last place of |v| at got's dtype."""
    form = torch.finfo(got.dtype)
    unit = form.eps * 2.0 ** np.floor(np.log2(np.maximum(np.abs(v), form.tiny)))
    return np.abs(got.double().numpy() - want) / unit
