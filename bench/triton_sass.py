"""What Triton's compiler makes of the kernels, read without a GPU: registers, spills, instructions.

Run: python -m bench.triton_sass        a table for the H100 and H200 (sm_90)

Slots (bench/sass.py) are those of a tile over the weights in it, its fixed part included; of "held"
and "first" without the sums that only the last tile of a team makes.
"""

import re
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import sass
from bench.sass import SLOTS_PER_BYTE, STATES
from tl1kernels.backends import triton_kernels as kernels
from tl1kernels.backends import triton_launch, triton_math, triton_penalties, triton_schedule
from tl1kernels.batch import state_dtype

H200 = GPUTarget("cuda", 90, 32)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": H200,
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_SPLIT = triton_schedule.COLUMNS_KIND, triton_schedule.LONG_KIND
# name: kernel, bit of its kind; each for aligned addresses, or not
TILES = {
    "flat": (kernels.resident_kernel, 2 * triton_schedule.FLAT),
    **{
        f"rows {width * parts}": (kernels.resident_kernel, 2 * kind)
        for kind, (width, parts) in enumerate(triton_schedule.WIDTHS)
    },
    **{
        f"{name} {phase}": (kernels.split_kernel, 2 * (kind + i))
        for name, kind in zip(("columns", "long"), _SPLIT, strict=True)
        for i, phase in enumerate(("first", "second", "whole", "held"))
        if (name, phase) != ("long", "whole")
    },
}

# What the table has.
DTYPES = (torch.float32, torch.bfloat16)
RULES = ("sgd", "sgd_momentum", "adam")
ONE_PASS = ("flat", "rows 512", "rows 576", "rows 3072", "rows 4096", "rows 8192")
TEAMS = ("columns held", "long held")
TWO_PASSES = ("columns first", "columns second", "long first", "long second")


class Code(sass.Code):
    """A compiled kernel: its instructions, and what ptxas says of it.

    Attributes:
        registers: of a thread.
        stack, local: bytes of local memory.
    """

    def __init__(self, cubin: Path) -> None:
        super().__init__(sass.cuobjdump("--dump-sass", cubin))
        usage = sass.cuobjdump("--dump-resource-usage", cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found, usage
        self.registers, self.stack, self.local = map(int, found.groups())

    @property
    def tile(self) -> Counter:
        """What a thread goes through for a tile, all 16-byte loads and stores included."""
        wide = {name: self.instructions[name] for name in ("LDG.E.128", "STG.E.128")}
        way = self.through({name: n for name, n in wide.items() if n})
        assert way is not None, wide
        return way


def tile_of(tile: str, rule: str, dtype: torch.dtype) -> triton_schedule.Tile:
    """Return how many weights a program takes of this kind of tile, and its warps."""
    if TILES[tile][0] is kernels.split_kernel:
        return triton_schedule.split_tile(dtype.itemsize, STATES[rule])
    width = 0 if tile == "flat" else triton_schedule.WIDTHS[TILES[tile][1] // 2][0]
    of = triton_schedule.resident_tile(width, dtype.itemsize, STATES[rule])
    return triton_schedule.Tile(max(of.weights, width), of.warps)


def compiled(tile, rule, penalty, dtype, aligned=True, target=H200, stochastic=False, copies=None):
    """Compile a kind of tile, or a tuple of them, for a target; return Triton's kernel."""
    names = (tile,) if isinstance(tile, str) else tile
    kernel, _ = TILES[names[0]]
    advance, apply = triton_math.RULES[rule]
    of = tile_of(names[0], rule, dtype)
    constants = {
        "Advance": advance,
        "Apply": apply,
        "STATES": STATES[rule],
        "Prox": triton_penalties.PENALTIES[penalty][1],
        "Couple": triton_penalties.PENALTIES[penalty][2],
        "T": _named(dtype),
        "G": _named(copies or dtype),
        "A": _named(state_dtype(dtype)),
        "VECTOR": 16 // dtype.itemsize,
        "KINDS": sum(1 << (TILES[name][1] + aligned) for name in names),
        "TILE": of.weights,
        "PART": of.part(dtype.itemsize),
        "ROWS": of.weights // triton_schedule.COLUMNS,
        "COLUMNS": triton_schedule.COLUMNS,
        **({} if stochastic else {"seed": None}),
    }
    return _compile(kernel, constants, dtype, of.warps, target)


def compiled_prepare(rule, penalty, dtype, counters=False, target=H200):
    """Compile the kernel of the coefficients; return Triton's compiled kernel."""
    constants = {
        "Prepare": triton_penalties.PENALTIES[penalty][0],
        "COUPLED": triton_penalties.PENALTIES[penalty][2] is not None,
        "ADAM": rule.startswith("adam"),
        "COUNTERS": counters,
        "A": _named(state_dtype(dtype)),
        "BLOCK": triton_launch.BLOCK,
    }
    return _compile(kernels.prepare_kernel, constants, dtype, triton_launch.PREPARE_WARPS, target)


def _compile(kernel, constants, dtype, warps, target):
    wide = "*fp64" if state_dtype(dtype) == torch.float64 else "*fp32"
    types = {"table": "*i64", "seed": "i64", "scalars": "*fp64", "work": "*i32", "sync": "*i32"}
    types |= dict.fromkeys(("coefficients", "partials", "factors"), wide)
    types |= dict.fromkeys(("grad_scale", "found_inf"), "*fp32")
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    used = {name: constants[name] for name in kernel.arg_names if name in constants}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def _named(dtype):
    return getattr(tl, str(dtype).removeprefix("torch."))


def code_of(compiled_kernel) -> Code:
    """Disassemble a kernel that was compiled for an NVIDIA GPU."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled_kernel.asm["cubin"])
        return Code(cubin)


def weights_per_thread(tile: str, rule: str, dtype: torch.dtype) -> float:
    """Return how many weights a thread of a tile takes."""
    of = tile_of(tile, rule, dtype)
    weights = of.weights
    if tile.startswith("rows"):
        width, parts = triton_schedule.WIDTHS[TILES[tile][1] // 2]
        if parts > 1:
            weights = parts * max(of.part(dtype.itemsize), width)
    return weights / (32 * of.warps)


def bytes_per_weight(rule: str, dtype: torch.dtype) -> int:
    """Return what a step must read and write: gradient, and twice parameter and state."""
    return 3 * dtype.itemsize + 2 * STATES[rule] * state_dtype(dtype).itemsize


def main() -> None:
    """Print the table."""
    print(f"triton {triton.__version__}, sm_90, TL1; a weight's slots and special functions")
    print(f"{'':34}{'registers':>10}{'slots':>8}{'budget':>8}{'special':>9}{'16-byte loads':>15}")
    for dtype, rule, tile in product(DTYPES, RULES, (*ONE_PASS, *TEAMS, *TWO_PASSES)):
        budget = SLOTS_PER_BYTE * bytes_per_weight(rule, dtype)
        code = code_of(compiled(tile, rule, "tl1", dtype))
        n = weights_per_thread(tile, rule, dtype)
        name = f"{str(dtype).removeprefix('torch.')} {rule} {tile}"
        way = code.tile
        print(
            f"{name:34}{code.registers:>10}{way.total() / n:>8.1f}{budget:>8.0f}"
            f"{sass.count(way, 'MUFU') / n:>9.2f}{code.instructions['LDG.E.128']:>15}"
        )


if __name__ == "__main__":
    main()
