"""What Triton's compiler makes of the kernels for GPUs that are not here.

Compiling and interpreting do not go together in one process: `make test` runs this file where
TRITON_INTERPRET is not set.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tl1kernels.backends import triton_launch
from tl1kernels.plan import FLOAT_DTYPES as DTYPES

pytest.importorskip("triton")
if triton_launch.interpreting():
    pytest.skip("TRITON_INTERPRET is set", allow_module_level=True)

from bench import triton_sass
from bench.sass import SLOTS_PER_BYTE, STATES
from bench.triton_sass import TARGETS, TILES

PENALTIES = triton_launch.penalty_rows()
SPLIT_KERNEL = triton_launch.load().split_kernel

BINARY = {"cuda": "cubin", "hip": "hsaco"}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """Triton's cache, new in each run; its workers share it."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        yield


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("rule", "penalty"),
    [(rule, "tl1") for rule in STATES] + [("sgd", name) for name in PENALTIES],
)
def test_every_rule_and_penalty_is_a_binary_for_every_gpu(target, rule, penalty):
    """With the tiles, and the dtypes, in turn."""
    gpu = TARGETS[target]
    i = list(STATES).index(rule) + list(TARGETS).index(target)
    i += list(PENALTIES).index(penalty)
    dtype = DTYPES[i % 4]
    tile = ("flat", "columns held", "columns second", "long held", "long first")[i % 5]
    code = triton_sass.compiled(tile, rule, penalty, dtype, target=gpu)
    assert code.asm[BINARY[gpu.backend]]
    prepare = triton_sass.compiled_prepare(rule, penalty, dtype, i % 2 == 0, target=gpu)
    assert prepare.asm[BINARY[gpu.backend]]


@pytest.mark.parametrize("tile", TILES)
def test_every_tile_is_a_binary_for_every_gpu(tile):
    for i, gpu in enumerate(TARGETS.values()):
        aligned = (i + list(TILES).index(tile)) % 2 == 0
        code = triton_sass.compiled(tile, "sgd", "tl1", torch.float32, aligned, gpu)
        assert code.asm[BINARY[gpu.backend]]


@pytest.mark.parametrize("target", TARGETS)
def test_stochastic_rounding_is_a_binary_for_every_gpu(target):
    gpu = TARGETS[target]
    for tile in ("flat", "columns held"):
        code = triton_sass.compiled(
            tile, "adam", "tl1", torch.bfloat16, target=gpu, stochastic=True
        )
        assert code.asm[BINARY[gpu.backend]]


@pytest.mark.parametrize("rule", triton_sass.RULES)
def test_on_hopper_stochastic_rounding_of_rows_is_within_the_budget(rule):
    compiled = triton_sass.compiled("rows 4096", rule, "tl1", torch.bfloat16, stochastic=True)
    code = triton_sass.code_of(compiled)
    assert (code.stack, code.local) == (0, 0)
    weights = triton_sass.weights_per_thread("rows 4096", rule, torch.bfloat16)
    budget = SLOTS_PER_BYTE * triton_sass.bytes_per_weight(rule, torch.bfloat16)
    assert 10 < code.tile.total() / weights <= budget


@pytest.mark.parametrize("target", TARGETS)
def test_master_weights_are_a_binary_for_every_gpu(target):
    """In one pass, with 16-byte accesses to gradients and copies too."""
    gpu = TARGETS[target]
    for tile, copies in (("flat", torch.bfloat16), ("columns held", torch.float16)):
        code = triton_sass.compiled(tile, "adam", "tl1", torch.float32, target=gpu, copies=copies)
        assert code.asm[BINARY[gpu.backend]]
    code = triton_sass.code_of(
        triton_sass.compiled("flat", "adam", "tl1", torch.float32, copies=torch.bfloat16)
    )
    weights = triton_sass.weights_per_thread("flat", "adam", torch.float32)
    n_bytes = weights * (4 + 2 + 8)  # read, and as many written
    assert code.instructions["LDG.E.128"] == n_bytes / 16
    assert code.instructions["STG.E.128"] == code.count("STG") == n_bytes / 16
    assert (code.stack, code.local) == (0, 0)


@pytest.mark.parametrize("penalty", [name for name in PENALTIES if PENALTIES[name][2]])
def test_penalties_of_whole_groups_are_binaries_on_every_kind_of_tile(penalty):
    """For Hopper, without local memory; one of them for each other GPU."""
    tiles = ("rows 64", "columns whole", "columns held", "long held", "columns second")
    for i, tile in enumerate((*tiles, "long first")):
        code = triton_sass.compiled(tile, "sgd", penalty, DTYPES[i % 4])
        assert triton_sass.code_of(code).local == 0
    for tile, (name, gpu) in zip(tiles, TARGETS.items(), strict=False):
        code = triton_sass.compiled(tile, "sgd", penalty, torch.float32, target=gpu)
        assert code.asm[BINARY[gpu.backend]], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", ["rows 576", "rows 8192", "columns whole", *triton_sass.TEAMS])
def test_on_hopper_nothing_is_spilled(tile, dtype):
    """The rule with the most state, on the tiles that hold the most."""
    for aligned in (True, False):
        compiled = triton_sass.compiled(tile, "adam_amsgrad", "tl1", dtype, aligned)
        code = triton_sass.code_of(compiled)
        assert (code.stack, code.local) == (0, 0)
        assert code.count("LDL") + code.count("STL") == 0


@pytest.mark.parametrize("dtype", triton_sass.DTYPES)
@pytest.mark.parametrize("rule", ["sgd", "adam_amsgrad"])  # the least state, and the most
def test_on_hopper_three_programs_of_a_batch_of_aligned_teams_run(rule, dtype):
    """Of all kinds together, which a batch may have: triton_schedule counts on two."""
    split = tuple(name for name, (kernel, _) in TILES.items() if kernel is SPLIT_KERNEL)
    code = triton_sass.code_of(triton_sass.compiled(split, rule, "tl1", dtype))
    assert (code.stack, code.local) == (0, 0)
    assert code.registers <= 65536 // (3 * 32 * triton_sass.tile_of(split[0], rule, dtype).warps)


@pytest.mark.parametrize("dtype", triton_sass.DTYPES)
@pytest.mark.parametrize("rule", triton_sass.RULES)
@pytest.mark.parametrize("tile", [*triton_sass.ONE_PASS, *triton_sass.TEAMS])
def test_on_hopper_aligned_tiles_are_16_byte_accesses_within_the_budget(tile, rule, dtype):
    code = triton_sass.code_of(triton_sass.compiled(tile, rule, "tl1", dtype))
    assert (code.stack, code.local) == (0, 0)
    weights = triton_sass.weights_per_thread(tile, rule, dtype)
    wide = torch.float32.itemsize * STATES[rule]
    read, written = weights * (2 * dtype.itemsize + wide), weights * (dtype.itemsize + wide)
    assert code.instructions["LDG.E.128"] == read / 16
    assert code.instructions["STG.E.128"] == written / 16
    shared = tile in triton_sass.TEAMS  # a tile leaves its sums, and the last of a team the factors
    assert code.count("STG") == written / 16 + 2 * shared
    budget = SLOTS_PER_BYTE * triton_sass.bytes_per_weight(rule, dtype)
    assert 10 < code.tile.total() / weights <= budget


class Driver:
    """Triton's driver of a Hopper that is not there: what is launched is taken down."""

    def __init__(self):
        self.launched = []
        self.utils = self

    def load_binary(self, name, kernel, shared, device):
        return object(), name, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 2**17}

    def get_current_device(self):
        return 99  # Triton keeps what it compiles by device: none that is there

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return triton_sass.H200

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
            assert (y, z, stream) == (1, 1, 7)
            self.launched.append((function, x, arguments))

        return launch


def test_a_step_like_the_last_one_launches_what_that_compiled(monkeypatch):
    """With the arguments that Triton's launcher passes on; anew where they are of other kinds."""
    from triton.runtime import driver

    from tl1kernels.backends.gpu import Step
    from tl1kernels.views import view_of

    here = Driver()
    looked_up = []
    for name in ("prepare_kernel", "resident_kernel", "split_kernel"):
        kernel = getattr(triton_launch.load(), name)
        run = kernel.run
        monkeypatch.setattr(
            kernel, "run", lambda *a, run=run, **options: looked_up.append(1) or run(*a, **options)
        )
    params = [torch.ones(70, 9), torch.ones(30)]
    views = [view_of(p, group) for p, group in zip(params, (1, None), strict=True)]
    numbers = [(None, None, None)] * 2
    scalars = torch.ones(2, len(triton_launch.maths().SCALARS), dtype=torch.float64)
    grads = [torch.ones_like(p) for p in params]
    kept = triton_launch.Kept()
    scales = torch.ones(2)

    def step(**options):
        here.launched.clear()
        looked_up.clear()
        triton_launch.step(
            Step(params, grads, [], None, numbers, views, scalars, "sgd", "tl1", **options), kept
        )
        return list(here.launched), len(looked_up)

    monkeypatch.setattr(driver, "_active", here)
    first, n = step()
    assert n == 3
    assert [function.split("_")[0] for function, *_ in first] == [
        "prepare",
        "resident",
        "split",
    ]
    second, n = step()
    assert n == 0
    for (name, programs, arguments), (*same, others) in zip(first, second, strict=True):
        assert same == [name, programs]
        assert len(arguments) == len(others)
        assert all(a is b or a == b for a, b in zip(arguments, others, strict=True))
    for options, anew in (
        ({"maximize": True}, 0),
        ({"grad_scale": scales[0]}, 0),
        ({"grad_scale": scales[1]}, 1),  # not at a multiple of 16 bytes
        ({"found_inf": scales[1]}, 3),
        ({"seed": 5}, 2),
        ({"seed": 6}, 0),
        ({"seed": 2**40}, 2),
    ):
        launched, n = step(**options)
        assert (len(launched), n) == (3, anew), options
    assert launched[1][2][4] == 2**40
    kept.aligned = kept.addresses = None  # as with a gradient that lies elsewhere
    assert step()[1] == 3


def test_the_table_of_slots_prints(capsys, monkeypatch):
    monkeypatch.setattr(triton_sass, "RULES", ("sgd",))
    monkeypatch.setattr(triton_sass, "DTYPES", (torch.float32,))
    triton_sass.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    tiles = (*triton_sass.ONE_PASS, *triton_sass.TEAMS, *triton_sass.TWO_PASSES)
    assert len(rows) == len(tiles)
    assert all(float(row[-4]) > 0 for row in rows)


@pytest.mark.parametrize("which", ["--triton", "--triton-powers"])
def test_the_polynomials_are_what_their_script_finds(which):
    root = Path(__file__).parents[1]
    script = [sys.executable, "-B", str(root / "csrc" / "prox_constants.py"), which]
    done = subprocess.run(script, check=True, capture_output=True, text=True)
    penalties = root / "tl1kernels" / "backends" / "triton_penalties.py"
    assert done.stdout.strip() in penalties.read_text()
