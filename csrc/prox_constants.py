"""Print the kernels' constants: minimax fits, found again from the definition.

Run: python csrc/prox_constants.py              those of prox_math.h (needs numpy and mpmath)
     python csrc/prox_constants.py --powers     those of penalties.h
     python csrc/prox_constants.py --triton     those of backends/triton_penalties.py,
     python csrc/prox_constants.py --triton-powers          by what they are for

TL1's prox is |v| - D P(q) / y^2, where P = 1 / r^2 and r is the largest root of
r^3 - r^2 + (4/27) q = 0 for q in [0, 1]. With u = sqrt(1 - q) that root is (4 z^2 - 1) / 3 for
z = cos(acos(u) / 3). P has a branch point at q = 1 but is smooth in u, and z too. All are 1 where
their argument is 0, so the fits are 1 + x * polynomial(x).

The prox of |w|^(1/2) is |v| r^2 for the largest root r of r^3 - r + k y = 0, where t is the
threshold, y = (t / |v|)^1.5 and k = 1 / (2 1.5^1.5); that of |w|^(2/3) is |v| r^3 for
r^4 - r + k y = 0, where y = (t / |v|)^(4/3) and k = 2^(-4/3). On [0, 1] neither comes to its double
root. One Newton step squares the fit's error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import mpmath as mp
import numpy as np

mp.mp.dps = 40


def z_of(u: mp.mpf) -> mp.mpf:
    """Return cos(acos(u) / 3)."""
    return mp.cos(mp.acos(u) / 3)


def p_of(u: mp.mpf) -> mp.mpf:
    """Return 1 / r^2."""
    return (3 / (4 * z_of(u) ** 2 - 1)) ** 2


def half_root(y: mp.mpf) -> mp.mpf:
    """Return the largest root of r^3 - r + k y = 0, k = 1 / (2 1.5^1.5)."""
    k = y / (2 * mp.mpf(1.5) ** 1.5)
    return 2 / mp.sqrt(3) * mp.cos(mp.acos(-k * mp.sqrt(27) / 2) / 3)


def two_thirds_root(y: mp.mpf) -> mp.mpf:
    """Return the largest root of r^4 - r + k y = 0, k = 2^(-4/3)."""
    k, r = y / mp.cbrt(16), mp.mpf(1)
    for _ in range(9):
        r -= (r**4 - r + k) / (4 * r**3 - 1)
    return r


def minimax(f: Callable[[mp.mpf], mp.mpf], high: float, degree: int) -> tuple[list[mp.mpf], float]:
    """Return the polynomial 1 + c_1 x + ... + c_degree x^degree of least relative error.

    Remez exchange on [0, high], for f(0) = 1.

    Returns:
        The coefficients c_1 to c_degree, and the largest relative error.
    """
    n = degree + 1  # unknowns: c_1 to c_degree, and the levelled error
    grid = [high * (1 - mp.cos(mp.pi * (i + 1) / 2000)) / 2 for i in range(2000)]
    values = [f(x) for x in grid]
    at = [int(1999 * (1 - mp.cos(mp.pi * (i + 0.5) / n)) / 2) for i in range(n)]
    for _ in range(12):
        system = mp.matrix(n, n)
        right = mp.matrix(n, 1)
        for row, i in enumerate(at):
            for k in range(1, n):
                system[row, k - 1] = grid[i] ** k / values[i]
            system[row, n - 1] = (-1) ** row
            right[row] = 1 - 1 / values[i]
        solution = mp.lu_solve(system, right)
        c = [solution[k] for k in range(n - 1)]
        fitted = [1 + x * mp.polyval(c[::-1], x) for x in grid]
        error = np.array([float(p / y - 1) for p, y in zip(fitted, values, strict=True)])
        # One extremum for each stretch of one sign.
        edges = np.flatnonzero(np.diff(np.sign(error))) + 1
        stretches = np.split(np.arange(error.size), edges)
        peaks = [int(s[np.argmax(np.abs(error[s]))]) for s in stretches]
        peaks.sort(key=lambda i: -abs(error[i]))
        at = sorted(peaks[:n])
        if len(at) < n:
            raise RuntimeError("the error does not alternate often enough")
    return c, float(np.abs(error).max())


# what is fitted: the function of x, the end of x's range
GENTLEST = "P - 1 = q * polynomial(q), for q <= 1/64", lambda q: p_of(mp.sqrt(1 - q)), 1 / 64
GENTLE = "P - 1 = q * polynomial(q), for q <= 1/8", lambda q: p_of(mp.sqrt(1 - q)), 1 / 8
STEEP = "P - 1 = x * polynomial(x), x = 1 - u, for q <= 1", lambda x: p_of(1 - x), 1.0
Z = "z - 1 = x * polynomial(x), x = 1 - u, for q <= 1", lambda x: z_of(1 - x), 1.0

HALF = "r - 1 = y * polynomial(y), r^3 - r + k y = 0, for y <= 1", half_root, 1.0
TWO_THIRDS = "r - 1 = y * polynomial(y), r^4 - r + k y = 0, for y <= 1", two_thirds_root, 1.0

# name: fit, degree
CPP = {
    "Tl1Gentlest": (GENTLEST, 2),
    "Tl1Gentle": (GENTLE, 4),
    "Tl1Steep": (STEEP, 10),
    "Tl1Z": (Z, 7),
}
POWERS = {
    "HalfRoot": (HALF, 5),
    "TwoThirdsRoot": (TWO_THIRDS, 7),
}
TRITON = {
    "_steep_10": (STEEP, 10),
    "_z_7": (Z, 7),
}
TRITON_POWERS = {
    "_half_root": (HALF, 5),
    "_two_thirds_root": (TWO_THIRDS, 7),
}
# degree, for P itself, by u
CPP_16_BIT = {"Tl1Short": 7, "Tl1Shortest": 5}
TRITON_16_BIT = {"_p_7": 7, "_p_5": 5}


Fit = tuple[tuple[str, Callable[[mp.mpf], mp.mpf], float], int]


def cpp(fits: dict[str, Fit]) -> list[str]:
    """Return the constants as lines of C++."""
    out = []
    for name, ((what, f, high), degree) in fits.items():
        c, error = minimax(f, high, degree)
        out += series(name, f"{what}: relative error {error:.1e}", c)
    return out


def cpp_16_bit() -> list[str]:
    """Return those of TL1 for 16 bits."""
    out = []
    for name, degree in CPP_16_BIT.items():
        c, what = p_of_u(degree)
        out += series(name, what, c)
    return out


def series(name: str, what: str, c: list[mp.mpf]) -> list[str]:
    """Return a struct for the coefficients c, the constant first."""
    return [
        f"// {what}",
        f"struct {name} {{",
        f"  static constexpr int TERMS = {len(c)};",
        "  TL1_INLINE static constexpr double coefficient(int i) {",
        "    const double c[TERMS] = {",
        *(f"        {mp.nstr(value, 17, min_fixed=-1, max_fixed=1)}," for value in c),
        *("    };", "    return c[i];", "  }", "};"),
    ]


def triton(fits: dict[str, Fit]) -> list[str]:
    """Return polynomials as lines of Python."""
    out = []
    for name, ((what, f, high), degree) in fits.items():
        c, error = minimax(f, high, degree)
        out += horner(name, "y" if "(y)" in what else "x", f"{what}: relative error {error:.1e}", c)
    return out


def triton_16_bit() -> list[str]:
    """Return those of TL1 for 16 bits."""
    out = []
    for name, degree in TRITON_16_BIT.items():
        c, what = p_of_u(degree)
        out += horner(name, "u", what, c)
    return out


def p_of_u(degree: int) -> tuple[list[mp.mpf], str]:
    """Return P itself by u: shorter to evaluate, with an error where P - 1 has none."""
    c, error = minimax(lambda u: p_of(u) / p_of(0), 1.0, degree)
    what = f"P = polynomial(u), for q <= 1: relative error {error:.1e}"
    return [p_of(0) * value for value in (1, *c)], what


def horner(name: str, x: str, what: str, c: list[mp.mpf]) -> list[str]:
    """Return a function of `x` for the polynomial with the coefficients c, the constant first."""
    *rest, before, last = map(float, c)
    return [
        "@triton.jit",
        f"def {name}({x}):",
        f'    """{what}."""',
        f"    p = {x} * {last!r} + {before!r}",
        *(f"    p = {x} * p + {value!r}" for value in reversed(rest)),
        "    return p",
        "",
        "",
    ]


PRINTS = {
    (): lambda: [*cpp(CPP), *cpp_16_bit()],
    ("--powers",): lambda: cpp(POWERS),
    ("--triton",): lambda: [*triton(TRITON), *triton_16_bit()][:-2],
    ("--triton-powers",): lambda: triton(TRITON_POWERS)[:-2],
}

if __name__ == "__main__":
    print("\n".join(PRINTS[tuple(sys.argv[1:])]()))
