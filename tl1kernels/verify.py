"""Check a backend against oracles that share no code with it: `tl1kernels verify`.

Fresh random input each time; the seed that reproduces it is in the report.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl1kernels import backends, oracles
from tl1kernels.functional import prox
from tl1kernels.optim import ProxAdam, ProxAdamW, ProxSGD
from tl1kernels.penalties import PENALTIES
from tl1kernels.plan import FLOAT_DTYPES

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
class Check:
    """One line of the report: the largest error over `cases` values, in `unit`, and its bound."""

    what: str
    against: str
    cases: int
    error: float
    bound: float
    unit: str

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; a NaN is not."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Report:
    """All checks of one backend."""

    backend: str
    seed: int
    checks: tuple[Check, ...]

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
            "checks": checks,
        }

    def __str__(self) -> str:
        lines = [f"backend {self.backend}, seed {self.seed}"]
        for c in self.checks:
            error = f"{c.error:.3g} {c.unit} (bound {c.bound:g}), {c.cases} values"
            verdict = "ok  " if c.passed else "FAIL"
            lines.append(f"{verdict}  {c.what:<46}  {c.against:<26}  {error}")
        passed = sum(c.passed for c in self.checks)
        lines.append(f"{passed} of {len(self.checks)} checks passed")
        return "\n".join(lines)


def verify(backend: str = "reference", seed: int | None = None) -> Report:
    """Run every check on one backend.

    Args:
        backend: a name of `BACKENDS`.
        seed: of the random input; None draws one.

    Raises:
        ValueError, RuntimeError: no such backend, or it cannot run here.
    """
    backends.require(backend)
    seed = secrets.randbelow(2**31) if seed is None else seed
    generator = np.random.default_rng(seed)
    checks: list[Check] = []
    with backends.use_backend(backend):
        for part in (_thresholds, _groups, _rules, _steps):
            checks += part(generator)
    return Report(backend, seed, tuple(checks))


def hard_cases(
    penalty: str, generator: np.random.Generator, n: int
) -> Iterator[tuple[float, float, float, float]]:
    """Yield random (v, step, weight, a) over the range of use, most near where v begins to live.

    a from 1e-3 to 1e6, step * weight from 1e-10 to 1, |v| from far below the threshold to far
    above it; not where the problem itself magnifies rounding, next to a double root.
    """
    oracle = oracles.ORACLES[penalty]
    while n:
        step, weight = (float(10 ** generator.uniform(-5, 0)) for _ in range(2))
        a = random_shape(penalty, step, generator, -3, 6)
        near = 1 + generator.choice([-1, 1]) * 10 ** generator.uniform(-6, 0)
        scale = near if generator.random() < 0.7 else 10 ** generator.uniform(-3, 5)
        v = float(generator.choice([-1, 1]) * oracle.threshold(step * weight, a) * scale)
        if v and oracle.condition(abs(v), step * weight, a) < 30:
            n -= 1
            yield v, step, weight, a


def random_shape(
    penalty: str | None, step: float, generator: np.random.Generator, low: int, high: int
) -> float:
    """Return a random shape a in [10^low, 10^high] that the penalty allows at this step size."""
    while True:
        a = float(10 ** generator.uniform(low, high))
        if penalty is None or PENALTIES[penalty].check(a, step) is None:
            return a


def _thresholds(generator: np.random.Generator) -> Iterator[Check]:
    """Check single weights against the definition of the prox, in float64 and float32."""
    for name, (dtype, bound) in product(
        PENALTIES, ((torch.float64, 1e-13), (torch.float32, 2.0**-24 * 1.01))
    ):
        errors = []
        for v, step, weight, a in hard_cases(name, generator, 100):
            x = torch.tensor([v], dtype=dtype)
            got = prox(x, step, lam=weight, penalty=name, a=a, mu=1.0).item()
            want = oracles.prox_by_definition(x.item(), step, weight, name, a)
            errors.append(abs(float(got - want)) / abs(x.item()))
        what = f"prox {name}, {_name(dtype)}"
        yield _check(what, "the definition, by search", errors, bound, "of |v|")


def _groups(generator: np.random.Generator) -> Iterator[Check]:
    """Thresholds with groups on random tensors against eq. 22 written as loops."""
    for penalty in (None, *PENALTIES):
        errors: list[Any] = []
        for group_by, group_weight in product(GROUPINGS, (None, "sqrt")):
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
            x = torch.from_numpy(v).to(memory_format=layout)
            got = prox(x, 0.3, **options).numpy()
            want = oracles.prox_as_published(v, 0.3, **options)
            errors += [np.abs(got - want)]
        what = f"prox {penalty or 'none'} + groups, float64"
        yield _check(what, "eq. 22, group by group", errors, 1e-12, "absolute")


def _rules(generator: np.random.Generator) -> Iterator[Check]:
    """Check steps with lam = 0 against torch.optim over 20 steps in float64: the same bits."""
    for name, (ours, torchs, options) in RULES.items():
        start = torch.from_numpy(generator.normal(size=(7, 5)))
        gradients = [torch.from_numpy(generator.normal(size=(7, 5))) for _ in range(20)]
        got, want = (_train(c, start, gradients, options) for c in (ours, torchs))
        error = (got - want).abs().numpy()
        yield _check(f"{name}, lam = 0, 20 steps, float64", "torch.optim", [error], 0.0, "absolute")


def _steps(generator: np.random.Generator) -> Iterator[Check]:
    """One whole step, every dtype, against torch.optim in float64 and then eq. 22."""
    for name, (ours, torchs, options) in RULES.items():
        for dtype in FLOAT_DTYPES:
            every = []
            for penalty, group_by in product((None, *PENALTIES), GROUPINGS):
                shape = tuple(int(n) for n in generator.integers(2, 5, size=4))
                start = torch.from_numpy(generator.normal(size=shape)).to(dtype)
                gradient = [torch.from_numpy(generator.normal(size=shape)).to(dtype)]
                regularizer: dict[str, Any] = {
                    "lam": 10 ** generator.uniform(-1, 1),
                    "a": random_shape(penalty, 0.1, generator, -1, 1),
                    "mu": generator.uniform(),
                    "penalty": penalty,
                    "group_by": group_by,
                }
                got = _train(ours, start, gradient, {**options, **regularizer, "lr": 0.1})
                wide = [g.double() for g in gradient]
                v = _train(torchs, start.double(), wide, {**options, "lr": 0.1})
                want = oracles.prox_as_published(v.numpy(), 0.1, **regularizer)
                errors = _ulps(got, want, v.numpy())
                if penalty is not None and dtype == torch.float64:
                    condition = np.vectorize(oracles.ORACLES[penalty].condition)
                    tau = 0.1 * regularizer["lam"] * regularizer["mu"]
                    errors = errors / condition(np.abs(v.numpy()), tau, regularizer["a"])
                every.append(errors)
            # Half an ulp is the one rounding; float64 has no wider format to round from.
            bound = 32.0 if dtype == torch.float64 else 0.501
            what = f"step {name}, {_name(dtype)}"
            yield _check(what, "torch.optim, then eq. 22", every, bound, "ulp")


def _check(what: str, against: str, errors: Sequence[Any], bound: float, unit: str) -> Check:
    every = np.concatenate([np.ravel(error) for error in errors])
    return Check(what, against, every.size, float(every.max()), bound, unit)  # a NaN is its own max


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _train(
    kind: Callable[..., torch.optim.Optimizer],
    start: Tensor,
    gradients: list[Tensor],
    options: dict[str, Any],
) -> Tensor:
    """Return `start` after a step for each gradient."""
    param = start.clone().requires_grad_()
    optimizer = kind([param], **options)
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
    return param.detach()


def _ulps(got: Tensor, want: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return |got - want| in units in the last place of |v| at got's dtype."""
    form = torch.finfo(got.dtype)
    unit = form.eps * 2.0 ** np.floor(np.log2(np.maximum(np.abs(v), form.tiny)))
    return np.abs(got.double().numpy() - want) / unit
