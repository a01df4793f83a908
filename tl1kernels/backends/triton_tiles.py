"""What every tile of the Triton kernels does, whoever its groups are shared with.

A tile: some of a tensor's weights, at `base + offsets`, from memory to t = the threshold of the
updated weight, and back when their factors are known. `row` is the tensor's of the table, `c` its
coefficients. Update rules and penalties are functions passed as constants: a kernel is compiled for
one of each, one type `T` of weights, one `G` of gradients, one `A` of arithmetic and the state.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from tl1kernels.backends.triton_math import (
    C_CUT,
    C_NORM_UNIT,
    C_OFFSET,
    C_ZERO,
    COPY,
    GRAD,
    PARAM,
    STATE,
)
from tl1kernels.backends.triton_penalties import shrink_factor

NOWHERE = tl.constexpr(1 << 20)  # beyond any place in a tile

MIX_1 = tl.constexpr(0x85EBCA6B)  # MurmurHash3's, of csrc/random.h
MIX_2 = tl.constexpr(0xC2B2AE35)


@triton.jit
def address_of(row, i: tl.constexpr, T: tl.constexpr, base, ALIGNED: tl.constexpr):
    """The address in column i of a table's row, `base` elements on."""
    start = tl.load(row + i).to(tl.pointer_type(T))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start + base


@triton.jit
def load_or(address, mask, other: tl.constexpr):
    """What is at the address; `other` where there is no weight: all comes to t = 0 there."""
    if mask is None:
        return tl.load(address)
    else:
        return tl.load(address, mask=mask, other=other)


@triton.jit
def thresholded(
    row, c, base, offsets, mask, AGAIN: tl.constexpr, ALIGNED: tl.constexpr, Advance: tl.constexpr,
    Apply: tl.constexpr, STATES: tl.constexpr, Prox: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
    A: tl.constexpr,
):
    """t; the state takes its next values, unless AGAIN says that it has them."""
    p = load_or(address_of(row, PARAM, T, base, ALIGNED) + offsets, mask, 0.0).to(A)
    g = load_or(address_of(row, GRAD, G, base, ALIGNED) + offsets, mask, 0.0).to(A)
    s0 = p
    s1 = p
    s2 = p
    if STATES > 0:
        s0 = load_or(address_of(row, STATE, A, base, ALIGNED) + offsets, mask, 0.0)
    if STATES > 1:
        s1 = load_or(address_of(row, STATE + 1, A, base, ALIGNED) + offsets, mask, 1.0)
    if STATES > 2:
        s2 = load_or(address_of(row, STATE + 2, A, base, ALIGNED) + offsets, mask, 1.0)
    if not AGAIN:
        s0, s1, s2 = Advance(p, g, s0, s1, s2, c)
        if STATES > 0:
            tl.store(address_of(row, STATE, A, base, ALIGNED) + offsets, s0, mask=mask)
        if STATES > 1:
            tl.store(address_of(row, STATE + 1, A, base, ALIGNED) + offsets, s1, mask=mask)
        if STATES > 2:
            tl.store(address_of(row, STATE + 2, A, base, ALIGNED) + offsets, s2, mask=mask)
    v = Apply(p, g, s0, s1, s2, c)
    if Prox is not None:
        size = tl.abs(v)
        w = tl.where(size <= tl.load(c + C_CUT), 0.0, Prox(size, c, T))
        v = _with_sign_of(w, v, A)
    return v


@triton.jit
def _with_sign_of(size, x, A: tl.constexpr):
    if A == tl.float64:
        sign = x.to(tl.int64, bitcast=True) & (-9223372036854775807 - 1)
        size = size.to(tl.int64, bitcast=True) & 9223372036854775807
        return (size | sign).to(tl.float64, bitcast=True)
    else:
        sign = x.to(tl.int32, bitcast=True) & (-2147483647 - 1)
        size = size.to(tl.int32, bitcast=True) & 2147483647
        return (size | sign).to(tl.float32, bitcast=True)


@triton.jit
def _squares(t, c):
    scaled = t * tl.load(c + C_NORM_UNIT)
    return scaled * scaled


@triton.jit
def measured(t, place, axis: tl.constexpr, c, Couple: tl.constexpr):
    """Of the groups along an axis: squares, sum, largest magnitude, the first place that has it.

    Only the squares where no penalty couples weights.
    """
    if Couple is None:
        squares = tl.sum(_squares(t, c), axis=axis)
        return squares, squares, squares, squares
    else:
        size = tl.abs(t)
        offset = tl.load(c + C_OFFSET)
        beyond = tl.where(size <= offset, 0.0, size - offset)
        largest = tl.max(tl.where(size >= 0, size, 0.0), axis=axis)  # no NaN: it has no place
        first = tl.where(size == tl.expand_dims(largest, axis), place, NOWHERE)
        squares = tl.sum(_squares(beyond, c), axis=axis)
        return squares, tl.sum(size, axis=axis), largest, tl.min(first, axis=axis)


@triton.jit
def finished(squares, total, largest, c, Couple: tl.constexpr):
    """What becomes of the groups: factor, cut, kept, as `triton_penalties` has them."""
    if Couple is None:
        factor = shrink_factor(squares, c)
        return factor, factor, factor
    else:
        return Couple(squares, total, largest, c)


@triton.jit
def shrunk(t, factor, cut, kept, first, A: tl.constexpr, Couple: tl.constexpr):
    """The weights; `first` says which is the first of the largest ones of its group."""
    if Couple is None:
        return t * factor
    else:
        size = tl.abs(t)
        w = tl.where(size < cut, 0.0, (size - cut) * factor)
        return _with_sign_of(tl.where(first, tl.where(kept >= 0, kept, w), w), t, A)


@triton.jit
def _mixed(h):
    h = (h ^ (h >> 16)) * MIX_1
    h = (h ^ (h >> 13)) * MIX_2
    return h ^ (h >> 16)


@triton.jit
def random_key(seed, tensor):
    """One tensor's, in one step, as csrc/random.h has it: its low half in the lower 32 bits."""
    first = seed.to(tl.int64).to(tl.uint32)
    second = (seed.to(tl.int64) >> 32).to(tl.uint32)
    low = _mixed(_mixed(second) + first + tensor.to(tl.uint32))
    high = _mixed(_mixed(low) + second)
    return (high.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def random_bits(key, place):
    """16 bits for each place, uint32, as csrc/random.h has them."""
    h = place.to(tl.uint32) * MIX_1 + key.to(tl.uint32)
    return ((h ^ (h >> 13) ^ (key >> 32).to(tl.uint32)) * MIX_2) >> 16


@triton.jit
def _rounded(w, c, T: tl.constexpr):
    """The weights as they are stored. In float16 small ones become zeros, which have no sign."""
    if T == tl.float16:
        return (w.to(T).to(tl.float32) + tl.load(c + C_ZERO)).to(T)
    else:
        return w.to(T)


@triton.jit
def write(
    row, c, key, base, offsets, mask, w, T: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr
):
    """Write the weights, and their copies where there are some.

    With a key of random bits, bfloat16 is rounded stochastically.
    """
    address = address_of(row, PARAM, T, base, ALIGNED) + offsets
    if key is not None:
        # Up with a probability of what is cut off: 16 random bits are added to those. Not to a NaN,
        # which could become a zero.
        random = random_bits(key, base + offsets).to(tl.int32)
        bits = (w.to(tl.int32, bitcast=True) + random) & -65536
        w = tl.where(w == w, bits.to(tl.float32, bitcast=True), w)
    w += tl.load(c + C_ZERO)
    tl.store(address, _rounded(w, c, T), mask=mask)
    if G != T:
        tl.store(address_of(row, COPY, G, base, ALIGNED) + offsets, _rounded(w, c, G), mask=mask)
