"""What each backend promises: the bounds that `verify` holds it to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from tl1kernels.backends import triton_launch


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
# The same with a shorter series for bfloat16, and roots and quotients that may be a unit or two
# off: Adam and a group's factor take both.
GPU = replace(NATIVE, step={**NATIVE.step, torch.float32: 16.0, torch.bfloat16: 0.54})
# Triton's interpreter cuts a float32 off where a GPU rounds it to bfloat16.
INTERPRETED = replace(NATIVE, step={**NATIVE.step, torch.bfloat16: 1.04})


def bounds_of(backend: str) -> Bounds:
    """Return what a backend promises on this machine."""
    if backend == "triton":
        return INTERPRETED if triton_launch.interpreting() else GPU
    return {"reference": ROUNDED_ONCE, "cpu": NATIVE, "cuda": GPU}[backend]
