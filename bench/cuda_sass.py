"""What nvcc makes of csrc/cuda, read without a GPU: registers, spills, instructions.

Run: python -m bench.cuda_sass [libtl1kernels_cuda.so]      a table for the GPU it was built for

Slots are the instructions that a thread goes through for 16 bytes of the parameter, over the
weights in them: the shortest way around the kernel's loop that reads and writes all of them. They
are counted for the three passes that csrc/cuda/tiles.h has on its hot path. The budget: at an
H200's 4.3 TB/s there are 41 slots for every 6 bytes that a weight moves.
"""

import heapq
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import triton

from bench.triton_sass import SLOTS_PER_BYTE, STATES
from tl1kernels.backends import native

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BINARY = "libtl1kernels_cuda.so"

SIZES = {"float": 4, "double": 8, "BFloat16": 2, "Float16": 2}
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
    def bytes_per_weight(self) -> int:
        """What a step must read and write."""
        state = 8 if self.param == "double" else 4
        copy = SIZES[self.grad] if self.grad != self.param else 0
        return 2 * SIZES[self.param] + SIZES[self.grad] + copy + 2 * STATES[self.rule] * state


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a kernel."""

    registers: int
    stack: int
    local: int


def usage_of(library: Path) -> dict[Name, Usage]:
    """Return registers and stack of every kernel of an update rule."""
    dump = _cuobjdump("--dump-resource-usage", library)
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    found = ((_name_of(name), map(int, rest)) for name, *rest in re.findall(pattern, dump))
    return {name: Usage(*rest) for name, rest in found if name}


def code_of(library: Path) -> dict[Name, "Code"]:
    """Disassemble every kernel of an update rule."""
    functions = re.split(r"^\s+Function : ", _cuobjdump("--dump-sass", library), flags=re.M)[1:]
    named = ((_name_of(text.split("\n", 1)[0].strip()), text) for text in functions)
    return {name: Code(text) for name, text in named if name}


def _cuobjdump(flag: str, library: Path) -> str:
    command = [TOOLS / "cuobjdump", flag, library]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _name_of(mangled: str) -> Name | None:
    if "6kernelI" not in mangled:
        return None
    text = mangled.split("6Config", 1)[1]
    types = [text[1]] if text[1] in "fd" else re.findall(r"B?Float16", text)[:1]
    rest = text[2:] if text[1] in "fd" else text.split(types[0], 1)[1]
    if rest[0] in "fd":
        types.append(rest[0])
    else:
        second = re.match(r"NS_8portable\d+(B?Float16)", rest)
        types.append(second.group(1) if second else types[0])
    known = {"f": "float", "d": "double"}
    rule = next(r for r in sorted(RULES, key=len, reverse=True) if f"{len(r)}{r}" in text)
    penalty = next(p for p in PENALTIES if f"{len(p)}{p}" in text)
    return Name(*(known.get(t, t) for t in types), RULES[rule], PENALTIES[penalty])


class Code:
    """A kernel's instructions as basic blocks, and the ways between them."""

    _LINE = re.compile(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.M
    )

    def __init__(self, sass: str) -> None:
        lines = [(int(a, 16), bool(p), op, rest) for a, p, op, rest in self._LINE.findall(sass)]
        self.instructions = Counter(op for _, _, op, _ in lines)
        exits: dict[int, list[int]] = {}  # of an instruction that goes elsewhere
        reconverge: dict[str, int] = {}
        starts = {lines[0][0]}
        for i, (address, predicated, op, rest) in enumerate(lines):
            after = lines[i + 1][0] if i + 1 < len(lines) else None
            kind = op.split(".")[0]
            target = int(found[-1], 16) if (found := re.findall(r"0x([0-9a-f]+)", rest)) else None
            if kind == "BSSY":
                reconverge[rest.split(",")[0].strip()] = target
            elif kind in ("BRA", "EXIT", "RET", "BRX", "BSYNC", "JMP"):
                if kind == "BSYNC":
                    target = reconverge[rest.strip()]
                goes = [target] if kind in ("BRA", "BSYNC", "JMP") else []
                # A branch may have a predicate among its operands too.
                conditional = predicated or re.search(r"\bU?!?U?P\d", rest)
                if conditional and after is not None:
                    goes.append(after)
                exits[address] = goes
                starts |= {*goes, *([after] if after is not None else [])}
        self.blocks: dict[int, list[str]] = defaultdict(list)
        self.ways: dict[int, list[int]] = {}
        block = lines[0][0]
        for address, _, op, _ in lines:
            if address in starts:
                if address != block:
                    self.ways.setdefault(block, [address])
                block = address
            self.blocks[block].append(op)
            if address in exits:
                self.ways[block] = exits[address]

    def count(self, prefix: str) -> int:
        """Return how many instructions begin so."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))

    def shortest(self, through: dict[str, int], without: tuple[str, ...] = ()) -> Counter | None:
        """Return the instructions of the shortest way around a loop; None if there is none.

        Args:
            through: how many instructions of each name it must go through.
            without: beginnings of names that it must not go through.
        """
        names = list(through)
        allowed = {
            block: tuple(min(ops.count(name), through[name]) for name in names)
            for block, ops in self.blocks.items()
            if not any(op.startswith(bad) for op in ops for bad in without)
        }
        best: tuple[int, list[int]] | None = None
        # A loop that goes through the first name begins at one of its blocks.
        for start in [block for block, has in allowed.items() if has[0]]:
            queue = [(len(self.blocks[start]), start, allowed[start], (start,))]
            seen = set()
            while queue:
                cost, block, has, path = heapq.heappop(queue)
                if (block, has) in seen or (best and cost >= best[0]):
                    continue
                seen.add((block, has))
                for to in self.ways.get(block, []):
                    if to == start and all(
                        h >= through[n] for h, n in zip(has, names, strict=True)
                    ):
                        if not best or cost < best[0]:
                            best = cost, list(path)
                    elif to in allowed and to != start:
                        sums = zip(has, allowed[to], names, strict=True)
                        more = tuple(min(h + m, through[n]) for h, m, n in sums)
                        heapq.heappush(queue, (cost + len(self.blocks[to]), to, more, (*path, to)))
        return Counter(op for b in best[1] for op in self.blocks[b]) if best else None


def passes(name: Name, code: Code) -> dict[str, Counter | None]:
    """Return what a thread goes through for 16 bytes of the parameter, by csrc/cuda's Pass."""
    parts = name.vector // (2 if name.param == "double" else 4)
    state = STATES[name.rule] * parts
    own_grad = SIZES[name.grad] == SIZES[name.param]
    stores = {"STG.E.128": state} if state else {}
    loads = {"LDG.E.128": 1 + own_grad + state}
    return {
        "finish": code.shortest({**loads, "STG.E.128": 1 + state}, ("LDS",)),
        "hold": code.shortest({**loads, **stores, "STS.128": parts}, ("LDS",)),
        "release": code.shortest({"STG.E.128": 1, "LDS.128": parts, "LDS": 1}, ("LDG.E.128",)),
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
    for param, rule, penalty in product(
        ("float", "BFloat16"), ("sgd", "sgd_momentum", "adam"), ("l1", "tl1")
    ):
        name = Name(param, param, rule, penalty)
        n = name.vector
        ways = passes(name, codes[name])
        slots = (f"{way.total() / n:10.1f}" if way else f"{'?':>10}" for way in ways.values())
        special = ways["finish"] and sum(
            m for op, m in ways["finish"].items() if op.startswith("MUFU")
        )
        print(
            f"{name!s:32}{usage[name].registers:>10}{''.join(slots)}"
            f"{SLOTS_PER_BYTE * name.bytes_per_weight:>10.0f}{(special or 0) / n:>10.2f}"
        )


if __name__ == "__main__":
    main()
