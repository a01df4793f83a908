"""What the Triton kernels find in memory, and the update rules of csrc/update_rules.h.

The penalties are in `triton_penalties.py`.
"""

# Triton reads these functions' source: names in upper case are constants of the compiler.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from tl1kernels.backends import gpu, triton_schedule

# --- Memory. The table, int64, a row a tensor: addresses, then the view (Schedule.layout).
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
STATE = tl.constexpr(2)  # gpu.STATES of them
COPY = tl.constexpr(2 + gpu.STATES)
COUNTER = tl.constexpr(3 + gpu.STATES)  # Adam's `step`, lr, lam if they are on the device, else 0
LR_THERE = tl.constexpr(4 + gpu.STATES)
LAM_THERE = tl.constexpr(5 + gpu.STATES)


def _column(name):
    return tl.constexpr(gpu.ADDRESSES + triton_schedule.FIELDS.index(name))


OUTER = _column("outer")
GROUPS = _column("groups")
INNER = _column("inner")
PIECES = _column("pieces")
PARTIALS = _column("partials")
TEAMS = _column("teams")
FACTORS = _column("factors")
TABLE = tl.constexpr(gpu.ADDRESSES + len(triton_schedule.FIELDS))

# The work, int32, a row a program: index of the tensor, kind, then of a resident tile its index, of
# others the index of its team, and its own in that.
ITEM = tl.constexpr(4)

# A tensor's scalars as the optimizer has them, float64, a row a tensor.
SCALARS = (
    *("lr", "weight_decay", "momentum", "dampening", "beta1", "beta2", "eps"),
    *("elementwise", "group", "a", "step"),
)


def _scalar(name):
    return tl.constexpr(SCALARS.index(name))


LR = _scalar("lr")
WEIGHT_DECAY = _scalar("weight_decay")
MOMENTUM = _scalar("momentum")
DAMPENING = _scalar("dampening")
BETA1 = _scalar("beta1")
BETA2 = _scalar("beta2")
EPS = _scalar("eps")
ELEMENTWISE = _scalar("elementwise")
GROUP = _scalar("group")
SHAPE = _scalar("a")
STEP = _scalar("step")
N_SCALARS = tl.constexpr(len(SCALARS))

# What `prepare_kernel` makes of them, in the arithmetic type, a row a tensor.
C_UNIT = tl.constexpr(0)  # of the gradient: -1 to maximize, over the loss's scale
C_DECAY = tl.constexpr(1)  # weight decay that goes into the gradient
C_KEEP = tl.constexpr(2)  # factor of the weight before the update (decoupled decay)
C_LR = tl.constexpr(3)  # step size; for Adam, over the first moment's bias correction
C_MOMENTUM = tl.constexpr(4)
C_GAIN = tl.constexpr(5)  # of the gradient in the momentum buffer: 1 - dampening
C_NESTEROV = tl.constexpr(6)
C_BETA1 = tl.constexpr(7)
C_RATE1 = tl.constexpr(8)
C_BETA2 = tl.constexpr(9)
C_RATE2 = tl.constexpr(10)
C_INVERSE_ROOT = tl.constexpr(11)  # 1 / sqrt(the second moment's bias correction)
C_EPS = tl.constexpr(12)
C_THRESHOLD = tl.constexpr(13)  # of a group's norm, in units of
C_NORM_UNIT = tl.constexpr(14)  # about 1 / threshold; 0 where groups weigh nothing
C_ZERO = tl.constexpr(15)  # added to every result: 0.0 makes -0.0 the zero of a dead weight, and
# -0.0 changes no bit of a tensor without a regularizer
C_CUT = tl.constexpr(16)  # |v| <= cut goes to 0
C_GRAD_LR = tl.constexpr(17)  # step size and decay for a gradient that is in another unit: times
C_GRAD_DECAY = tl.constexpr(18)  # C_UNIT, and over it
C_SHAPE = tl.constexpr(19)  # the penalty's own, up to N_COEFFICIENTS; where it couples groups:
C_TAU = tl.constexpr(19)  # its weight times the step
C_OFFSET = tl.constexpr(20)  # taken off |v| before it is squared
N_COEFFICIENTS = tl.constexpr(32)


# --- Update rules, torch.optim's: `advance` takes the state to its next values, and `apply` gives
# the updated weight for them: where the state has its next values, `apply` alone finds v again.


@triton.jit
def _decayed(p, g, decay):
    return tl.where(decay != 0, g + decay * p, g)  # 0 * inf would be NaN


@triton.jit
def _gradient(p, g, c):
    return _decayed(p, tl.load(c + C_UNIT) * g, tl.load(c + C_DECAY))


@triton.jit
def _no_state(p, g, s0, s1, s2, c):
    return s0, s1, s2


@triton.jit
def _assign(p, g, s0, s1, s2, c):
    return g


@triton.jit
def _sgd(p, g, s0, s1, s2, c):
    return p - tl.load(c + C_GRAD_LR) * _decayed(p, g, tl.load(c + C_GRAD_DECAY))


@triton.jit
def _momentum_state(p, g, s0, s1, s2, c):
    g = _gradient(p, g, c)
    return tl.load(c + C_MOMENTUM) * s0 + tl.load(c + C_GAIN) * g, s1, s2


@triton.jit
def _momentum(p, g, s0, s1, s2, c):
    ahead = _gradient(p, g, c) + tl.load(c + C_MOMENTUM) * s0
    return p - tl.load(c + C_LR) * tl.where(tl.load(c + C_NESTEROV) != 0, ahead, s0)


@triton.jit
def _adam_state(p, g, s0, s1, s2, c):
    g = _gradient(p, g, c)
    rate1 = tl.load(c + C_RATE1)
    # torch.lerp's two forms: the other one would cancel a large old mean against itself.
    far = g - tl.load(c + C_BETA1) * (g - s0)
    mean = tl.where(rate1 < 0.5, s0 + rate1 * (g - s0), far)
    return mean, tl.load(c + C_BETA2) * s1 + tl.load(c + C_RATE2) * g * g, s2


@triton.jit
def _adam_over(p, mean, second, c):
    root = tl.sqrt(second) * tl.load(c + C_INVERSE_ROOT) + tl.load(c + C_EPS)
    return tl.load(c + C_KEEP) * p - tl.load(c + C_LR) * (mean / root)


@triton.jit
def _adam(p, g, s0, s1, s2, c):
    return _adam_over(p, s0, s1, c)


@triton.jit
def _amsgrad_state(p, g, s0, s1, s2, c):
    s0, s1, s2 = _adam_state(p, g, s0, s1, s2, c)
    return s0, s1, tl.maximum(s1, s2, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _amsgrad(p, g, s0, s1, s2, c):
    return _adam_over(p, s0, s2, c)


RULES = {
    "assign": (_no_state, _assign),
    "sgd": (_no_state, _sgd),
    "sgd_momentum": (_momentum_state, _momentum),
    "adam": (_adam_state, _adam),
    "adam_amsgrad": (_amsgrad_state, _amsgrad),
}
"""By the name of csrc/update_rules.h: advance, apply."""


# --- Numbers.


@triton.jit
def round_down(x, A: tl.constexpr):
    """The largest A <= x, for x >= 0."""
    near = x.to(A)
    if A == tl.float32:
        bits = near.to(tl.int32, bitcast=True)
        near = tl.where(near.to(tl.float64) > x, bits - 1, bits).to(tl.float32, bitcast=True)
    return near
