"""What nvcc makes of csrc/cuda, read without a GPU: registers, spills, instructions.

Run: python -m bench.cuda_sass [libtl1kernels_cuda.so]      a table for the GPU it was built for

Slots (bench/sass.py) are counted for the three passes that csrc/cuda/tiles.h has on its hot path.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from bench.sass import SLOTS_PER_BYTE, STATES, Code, count, cuobjdump
from tl1kernels.backends import native

BINARY = "libtl1kernels_cuda.so"

SIZES = {"float": 4, "double": 8, "BFloat16": 2, "Float16": 2, "StochasticBFloat16": 2}
RULES = {
    "Assign": "assign",
    "Sgd": "sgd",
    "SgdMomentum": "sgd_momentum",
    "Adam": "adam",
    "AdamAmsgrad": "adam_amsgrad",
}
PENALTIES = {"Soft": "l1", "Transformed": "tl1", "Others": "others", "None": "coupled"}


@dataclass(frozen=True)
class Name:
    """What a kernel is for: stored types of parameter and gradient, update rule, penalty."""

    param: str
    grad: str
    rule: str
    penalty: str

    def __str__(self) -> str:
        grad = "" if self.grad == self.param else f"/{self.grad}"
        return f"{self.param}{grad} {self.rule} {self.penalty}"

    @property
    def vector(self) -> int:
        """Weights in 16 bytes."""
        return 16 // SIZES[self.param]

    @property
    def turns(self) -> int:
        """Vectors that a thread takes at a time: csrc/cuda/weights.h's AT_ONCE."""
        return 2 if self.vector == 4 and not STATES[self.rule] else 1

    @property
    def bytes_per_weight(self) -> int:
        """What a step must read and write."""
        state = 8 if self.param == "double" else 4
        copy = SIZES[self.grad] if SIZES[self.grad] != SIZES[self.param] else 0
        return 2 * SIZES[self.param] + SIZES[self.grad] + copy + 2 * STATES[self.rule] * state


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a kernel."""

    registers: int
    stack: int
    local: int


def usage_of(library: Path) -> dict[Name, Usage]:
    """Return registers and stack of every kernel of an update rule."""
    dump = cuobjdump("--dump-resource-usage", library)
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    found = ((_name_of(name), map(int, rest)) for name, *rest in re.findall(pattern, dump))
    return {name: Usage(*rest) for name, rest in found if name}


def code_of(library: Path) -> dict[Name, Code]:
    """Disassemble every kernel of an update rule."""
    functions = re.split(r"^\s+Function : ", cuobjdump("--dump-sass", library), flags=re.M)[1:]
    named = ((_name_of(text.split("\n", 1)[0].strip()), text) for text in functions)
    return {name: Code(text) for name, text in named if name}


def _name_of(mangled: str) -> Name | None:
    if "6kernelI" not in mangled:
        return None
    text = mangled.split("6Config", 1)[1]
    types = [text[1]] if text[1] in "fd" else re.findall(r"(?:Stochastic)?B?Float16", text)[:1]
    rest = text[2:] if text[1] in "fd" else text.split(types[0], 1)[1]
    if rest[0] in "fd":
        types.append(rest[0])
    else:
        second = re.match(r"E?NS\d*_(?:8portable)?\d(B?Float16)", rest)
        types.append(second.group(1) if second else types[0])
    known = {"f": "float", "d": "double"}
    rule = next(r for r in sorted(RULES, key=len, reverse=True) if f"{len(r)}{r}" in text)
    penalty = next(p for p in PENALTIES if f"{len(p)}{p}" in text)
    return Name(*(known.get(t, t) for t in types), RULES[rule], PENALTIES[penalty])


@dataclass(frozen=True)
class Pass:
    """What a thread goes through for some weights."""

    way: Counter
    weights: int

    @property
    def slots(self) -> float:
        """Instructions of a weight."""
        return self.way.total() / self.weights

    @property
    def special(self) -> float:
        """Special functions of a weight."""
        return count(self.way, "MUFU") / self.weights


def passes(name: Name, code: Code) -> dict[str, Pass | None]:
    """Return csrc/cuda/tiles.h's passes by their names there; None for one that is not found."""
    parts = name.vector // (2 if name.param == "double" else 4)
    state = STATES[name.rule] * parts
    own_grad = SIZES[name.grad] == SIZES[name.param]
    n = name.turns
    units = (1 + own_grad + state) * n
    loads = {"LDGSTS.E.BYPASS.128": units}
    stores = {"STG.E.128": state * n} if state else {}
    finish = code.around({**loads, "STG.E.128": (1 + state) * n, "LDS.128": units}, ("STS",))
    hold = code.around({**loads, **stores, "STS.128": parts * n, "LDS.128": units})
    release = code.around({"STG.E.128": 1, "LDS.128": parts}, ("LDGSTS",))
    return {
        "finish": finish and Pass(finish, n * name.vector),
        "hold": hold and Pass(hold, n * name.vector),
        "release": release and Pass(release, name.vector),
    }


def main() -> None:
    """Print the table."""
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else native.installed(BINARY)
    if library is None:
        raise SystemExit(f"{BINARY} was not built")
    usage, codes = usage_of(library), code_of(library)
    print(f"{library.name}: instructions a weight, by pass (csrc/cuda/tiles.h)")
    columns = ("registers", "finish", "hold", "release", "budget", "special")
    print(f"{'':32}" + "".join(f"{column:>10}" for column in columns))
    types = ("float", "float"), ("BFloat16", "BFloat16"), ("StochasticBFloat16", "BFloat16")
    for of, rule, penalty in product(types, ("sgd", "sgd_momentum", "adam"), ("l1", "tl1")):
        name = Name(*of, rule, penalty)
        ways = passes(name, codes[name])
        slots = (f"{way.slots:>10.1f}" if way else f"{'?':>10}" for way in ways.values())
        special = ways["finish"].special if ways["finish"] else 0.0
        budget = SLOTS_PER_BYTE * name.bytes_per_weight
        registers = usage[name].registers
        print(f"{name!s:32}{registers:>10}{''.join(slots)}{budget:>10.0f}{special:>10.2f}")


if __name__ == "__main__":
    main()
