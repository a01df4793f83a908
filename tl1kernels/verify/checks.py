"""What `verify` checks: generators of checks, `PARTS`, each on fresh random input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl1kernels import backends, oracles
from tl1kernels.backends import cuda, triton_launch
from tl1kernels.functional import prox
from tl1kernels.optim import ProxAdam, ProxAdamW, ProxSGD
from tl1kernels.penalties import PENALTIES
from tl1kernels.plan import FLOAT_DTYPES
from tl1kernels.verify.bounds import ROUNDED_ONCE, Bounds
from tl1kernels.verify.report import Check
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
    # Where decay all but cancels a gradient, Adam divides its rounding error by eps.
    "Adam, AMSGrad, decay": (
        ProxAdam,
        torch.optim.Adam,
        {"amsgrad": True, "weight_decay": 0.01, "maximize": True, "eps": 1e-3},
    ),
    "AdamW": (ProxAdamW, torch.optim.AdamW, {}),
}
"""Ours, torch's and the options, for the checks of whole steps."""


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
            scale = np.maximum(np.abs(v), start.double().abs().numpy())
            errors = _ulps(got, want, scale)
            once = bounds is ROUNDED_ONCE
            terms = 0.1, group["lam"] * group["mu"], penalty, group["a"], group["group_by"]
            if penalty is not None and (dtype == torch.float64 or not once):
                errors = errors / oracles.condition(v, *terms)
            arithmetic = torch.float64 if once else torch.promote_types(dtype, torch.float32)
            rounding = 4 * torch.finfo(arithmetic).eps * scale
            errors = np.where(oracles.undecided(v, rounding, *terms), 0, errors)
            row = f"{penalty or 'no penalty'}, group_by={group['group_by']}"
            against, bound = "torch.optim, then eq. 22", bounds.step[dtype]
            yield _check(f"step {name}", row, dtype, against, [errors], bound)


def _many(
    generator: np.random.Generator, bounds: Bounds, device: torch.device, penalties: Penalties
) -> Iterator[Check]:
    """Check many weights near every kink and far off against the reference in float64.

    Which of them die, and in float32 how large their error is, unless they are at a kink. A weight
    within rounding of the threshold may go either way; how far off one lies is bounded.
    """
    elementwise = [name for name in penalties if name in oracles.ORACLES]
    for name, (dtype, bound) in product(elementwise, bounds.prox.items()):
        condition = np.vectorize(oracles.ORACLES[name].condition, otypes=[float])
        distances, errors, differing = [], [], 0
        for _ in range(5):
            step, lam = (float(10 ** generator.uniform(-5, 0)) for _ in range(2))
            options: dict[str, Any] = {"lam": lam, "penalty": name}
            options |= {"a": random_shape(name, step, generator, -3, 6), "group_by": None}
            kinks = np.array(oracles.ORACLES[name].kinks(step, lam, options["a"]))
            exponents = generator.uniform(-7.5 if dtype == torch.float32 else -16, 0, 400)
            near = 1 + generator.choice([-1, 1], 400) * 10**exponents
            scale = np.concatenate([near, 10 ** generator.uniform(-3, 5, 100)])
            sign = generator.choice([-1, 1], 500)
            v = torch.from_numpy(sign * scale * generator.choice(kinks, 500)).to(dtype)
            got = prox(v.to(device), step, **options).cpu().numpy()
            want = prox(v.double(), step, **options, backend="reference").numpy()
            size = np.abs(v.double().numpy())
            unit = torch.finfo(dtype).eps * 2.0 ** np.floor(np.log2(size))
            distance = np.min([np.abs(size - kink) for kink in kinks], axis=0) / unit
            differs = (got == 0) != (want == 0)
            distances.append(np.where(differs, distance, 0))
            differing += int(differs.sum())
            off = np.abs(got - want) / unit / condition(size, step, lam, options["a"])
            errors.append(np.where(distance <= 4, 0, off))
        check = _check(
            "zeros", name, dtype, "the reference", distances, bound, "ulp of |v| from the threshold"
        )
        yield replace(check, differing=differing)
        if dtype == torch.float32:  # in float64 the reference has errors of its own
            yield _check("many weights", name, dtype, "the reference in float64", errors, bound)


def _large_shape() -> tuple[int, int]:
    """Return the shape of a matrix that the asked-for backend takes in more than one piece.

    Native code has columns and layers of this one in two sweeps. Interpreters are slow.
    """
    if backends.asked_for() == "triton" and triton_launch.interpreting():
        return 66, 70
    return (130, 260) if backends.asked_for() == "cuda" and cuda.emulated() else (512, 700)


def _large(
    generator: np.random.Generator, bounds: Bounds, device: torch.device, penalties: Penalties
) -> Iterator[Check]:
    """Check three steps on large tensors against the reference, which takes the same ones.

    What small tensors and single steps do not show: the tiles of large ones, and what a step
    leaves in the state. Under penalties whose prox does not jump here, or a rounding would decide.
    """
    steady = [name for name in penalties if name in (None, "tl1", "l1")]
    if backends.asked_for() == "reference" or not steady:
        return
    others = cycle(dtype for dtype in FLOAT_DTYPES if dtype != torch.float32)
    for penalty, (name, (ours, _, options)) in zip(cycle(steady), RULES.items(), strict=False):
        for dtype in (torch.float32, next(others)):
            shape, errors = _large_shape(), []
            for group_by in (None, "out", "in", "layer"):
                start, *gradients = (
                    torch.from_numpy(generator.normal(size=shape)).to(dtype) for _ in range(4)
                )
                terms = {"lam": 0.1, "penalty": penalty, "group_by": group_by, "lr": 0.1}
                got = _train(ours, start, gradients, {**options, **terms}, device)
                with backends.use_backend("reference"):
                    want = _train(ours, start, gradients, {**options, **terms}).double().numpy()
                errors.append(_ulps(got, want, np.full(shape, np.abs(want).max())))
            row = f"{name}, {penalty or 'no penalty'}"
            bound, unit = 4 * max(bounds.step[dtype], 1), "ulp of the largest weight"
            yield _check("large tensors", row, dtype, "the reference", errors, bound, unit)


def _bits(
    generator: np.random.Generator, bounds: Bounds, device: torch.device, penalties: Penalties
) -> Iterator[Check]:
    """Check that the same step gives the same bits: run after run, natively for 1, 2, 4 threads.

    A step on every grouping, large enough that native code gives each thread a part of it. The
    update rules come in turn.
    """
    native, shape = backends.asked_for() == "cpu", _large_shape()
    rules = cycle(RULES.values())
    for (ours, _, options), (penalty, dtype) in zip(
        rules, product(penalties, FLOAT_DTYPES), strict=False
    ):
        views = [by for by in _groupings(penalty) if by in (None, "out", "in", "layer")]
        starts, gradients = (
            [torch.from_numpy(generator.normal(size=shape)).to(dtype) for _ in views]
            for _ in range(2)
        )
        lam = 0.001 if penalty == "cges" else 0.1
        a = random_shape(penalty, 0.1, generator, -1, 1)
        groups = [{"lam": lam, "a": a, "penalty": penalty, "group_by": by} for by in views]
        of = (partial(ours, **options, lr=0.1), starts, gradients, groups, device)
        threads = torch.get_num_threads()
        row, unit = penalty or "no penalty", "differing weights"
        again = _differing((threads, threads), *of)
        yield _check("bits", row, dtype, "another run", [again], 0, unit)
        if native:  # the reference's sums are torch's, which splits large ones among threads
            counts = _differing((1, 2, 4), *of)
            yield _check("bits, 1, 2, 4 threads", row, dtype, "one thread", [counts], 0, unit)


def _roundings(
    generator: np.random.Generator, bounds: Bounds, device: torch.device, penalties: Penalties
) -> Iterator[Check]:
    """Check that bfloat16 is rounded stochastically: without bias, and as the reference does it.

    To one of both neighbours of what eq. 22 gives in float64. Which of them may differ where the
    last places of a float32 decide.
    """
    dtype, rule = torch.bfloat16, partial(ProxSGD, lr=0.1, rounding="stochastic")
    for penalty in penalties:
        lam, mu, a = 0.1, 0.5, random_shape(penalty, 0.1, generator, -1, 1)
        views = [by for by in _groupings(penalty) if by in (None, "out", "in", "layer")]
        starts, gradients = (
            [torch.from_numpy(generator.normal(size=(12, 60))).to(dtype) for _ in views]
            for _ in range(2)
        )
        terms: dict[str, Any] = {"lam": lam, "mu": mu, "penalty": penalty, "a": a}
        of = rule, starts, gradients, [{**terms, "group_by": by} for by in views]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed := int(generator.integers(2**62)))
            results = _step(*of, device)
            torch.manual_seed(seed)
            with backends.use_backend("reference"):
                alike = _step(*of, _CPU)
        errors, bias, variance, differing = [], 0.0, 1e-9, 0
        for start, gradient, got, other, by in zip(
            starts, gradients, results, alike, views, strict=True
        ):
            v = start.double().numpy() - 0.1 * gradient.double().numpy()
            want = oracles.prox_as_published(v, 0.1, **terms, group_by=by)
            clear = ~oracles.undecided(v, 1e-6 * np.abs(v), 0.1, lam * mu, penalty, a, by)
            scale = np.maximum(np.abs(v), start.double().abs().numpy())
            errors.append(np.where(clear, _ulps(got, want, scale), 0))
            differing += int((clear & (_patterns(got) != _patterns(other)).numpy()).sum())
            # Of what all but cancels the float32 before decides.
            clear &= np.abs(want) > scale / 16
            low = want.astype(np.float32).view(np.int32) & -65536  # towards zero
            unit = (low + 65536).view(np.float32) - low.view(np.float32)
            share = ((want - low.view(np.float32)) / unit)[clear]
            bias += float(((got.double().numpy() - want) / unit)[clear].sum())
            variance += float((share * (1 - share)).sum())
        section, row, exact = "stochastic rounding", penalty or "no penalty", "eq. 22 in float64"
        sigma = [abs(bias) / variance**0.5]
        of_1000 = [1000 * differing / sum(start.numel() for start in starts)]
        unit_of_bits = "weights of 1000 that differ"
        yield _check(section, row, dtype, exact, errors, 1.04)
        yield _check(f"{section}, on average", row, dtype, exact, sigma, 6, "sigma")
        yield _check(f"{section}, bits", row, dtype, "the reference", of_1000, 5, unit_of_bits)


def _differing(threads: Sequence[int], *step: Any) -> list[int]:
    """Return how many weights have other bits than in the first run: by run and tensor.

    A run for each number of threads; `step` is what `_step` takes.
    """
    before = torch.get_num_threads()
    runs = []
    try:
        for n in threads:
            torch.set_num_threads(n)
            runs.append([_patterns(weights) for weights in _step(*step)])
    finally:
        torch.set_num_threads(before)
    first, *others = runs
    return [int((x != y).sum()) for run in others for x, y in zip(first, run, strict=True)]


def _patterns(x: Tensor) -> Tensor:
    """Return the bits of each weight, as whole numbers."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


PARTS = (_thresholds, _many, _groups, _rules, _steps, _large, _roundings, _bits)
"""All that is checked: functions of the generator, the bounds, the device and the penalties."""


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
    p999 = float(np.quantile(every, 0.999, method="inverted_cdf"))
    return Check(section, row, _name(dtype), against, every.size, largest, bound, unit, p999)


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
