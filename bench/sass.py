"""Machine code for NVIDIA's GPUs, read without one: what a thread goes through.

Slots are a thread's instructions on the shortest way that reads and writes all of its weights. The
budget: at an H200's 4.3 TB/s there are 41 slots for every 6 bytes that a weight moves.
"""

import heapq
import re
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import triton

SLOTS_PER_BYTE = 41 / 6
STATES = {"assign": 0, "sgd": 0, "sgd_momentum": 1, "adam": 2, "adam_amsgrad": 3}
"""Tensors of state, by update rule."""


def cuobjdump(flag: str, binary: Path) -> str:
    """Run the disassembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, binary], check=True, capture_output=True, text=True).stdout


def count(instructions: Counter, prefix: str) -> int:
    """Return how many of them begin so."""
    return sum(n for name, n in instructions.items() if name.startswith(prefix))


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
        self._start = lines[0][0]
        starts = {self._start}
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
        self._blocks: dict[int, list[str]] = defaultdict(list)
        self._ways: dict[int, list[int]] = {}
        block = self._start
        for address, _, op, _ in lines:
            if address in starts:
                if address != block:
                    self._ways.setdefault(block, [address])
                block = address
            self._blocks[block].append(op)
            if address in exits:
                self._ways[block] = exits[address]

    def count(self, prefix: str) -> int:
        """Return how many instructions begin so."""
        return count(self.instructions, prefix)

    def through(self, names: dict[str, int]) -> Counter | None:
        """Return the instructions of the shortest way through the kernel; None if there is none.

        Args:
            names: how many instructions of each name it must go through.
        """
        ends = {block for block, ops in self._blocks.items() if "EXIT" in ops}
        return self._shortest([self._start], names, (), lambda _start, block: block in ends)

    def around(self, names: dict[str, int], without: tuple[str, ...] = ()) -> Counter | None:
        """Return the instructions of the shortest way around a loop; None if there is none.

        Args:
            names: how many instructions of each name it must go through, at least one.
            without: beginnings of names that it must not go through.
        """
        first = next(iter(names))  # a loop through it begins at one of its blocks
        starts = [block for block, ops in self._blocks.items() if first in ops]
        ways = (
            self._shortest([s], names, without, lambda start, block: start in self._ways[block])
            for s in starts
        )
        return min((way for way in ways if way), key=Counter.total, default=None)

    def _shortest(self, starts, names, without, ends) -> Counter | None:
        """Return what is on the shortest way from one of `starts` to a block where `ends` holds."""
        allowed = {
            block: tuple(min(ops.count(name), n) for name, n in names.items())
            for block, ops in self._blocks.items()
            if not any(op.startswith(bad) for op in ops for bad in without)
        }
        enough = tuple(names.values())
        queue = [(len(self._blocks[s]), s, allowed[s], (s,)) for s in starts if s in allowed]
        seen = set()
        while queue:
            cost, block, has, path = heapq.heappop(queue)
            if (block, has) in seen:
                continue
            seen.add((block, has))
            if has == enough and ends(path[0], block):
                return Counter(op for b in path for op in self._blocks[b])
            for to in self._ways.get(block, []):
                if to in allowed and to != path[0]:
                    more = zip(has, allowed[to], enough, strict=True)
                    sums = tuple(min(h + m, n) for h, m, n in more)
                    heapq.heappush(queue, (cost + len(self._blocks[to]), to, sums, (*path, to)))
        return None
