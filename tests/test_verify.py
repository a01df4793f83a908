"""verify: passes on the truth, fails on planted errors, and can be repeated."""

import itertools
import json
import re
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import tl1kernels as tk
from tests.common import COUPLED, ON_THE_REFERENCE_ALONE
from tl1kernels import backends, cli, oracles
from tl1kernels.backends import reference
from tl1kernels.penalties import Penalty, Regularizer
from tl1kernels.verify import GROUPINGS, RULES, Report, bounds, checks, verify
from tl1kernels.views import view_of


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_every_backend_passes(backend):
    reason = backends.BACKENDS[backend].unavailable()
    if reason:
        pytest.skip(reason)
    report = verify(backend, penalties=("tl1", None))  # `make test` has all of them verified
    assert report.passed, str(report)
    rows = {(check.section, check.row, check.dtype) for check in report.checks}
    assert len(rows) == len(report.checks) > 300


def test_the_table_has_a_cell_for_every_rule_penalty_view_and_dtype(monkeypatch):
    monkeypatch.setattr("tl1kernels.verify.PARTS", (checks._steps,))
    report = verify("reference", 0)
    text = str(report)
    for section in RULES:
        assert f"step {section}: largest error" in text
    for penalty, group_by in product((None, *tk.PENALTIES), GROUPINGS):
        if group_by is None and penalty in COUPLED:
            continue
        penalty = penalty or "no penalty"
        row = f"{penalty}, group_by={group_by}"
        assert sum(check.row == row for check in report.checks) == 4 * len(RULES)
        assert text.count(f"  {row} ") == len(RULES)


def plant_wrong_coefficient(monkeypatch):
    right = reference.PROX["tl1"]

    def wrong(v, step, terms):
        return right(v, step, terms._replace(elementwise=terms.elementwise * (1 + 1e-6)))

    monkeypatch.setitem(reference.PROX, "tl1", wrong)


def plant_wrong_group_scale(monkeypatch):
    right = reference.shrink_groups

    def wrong(t, tau):
        out = right(t, tau)
        out[-1, :, -1] *= 1 + 1e-6
        return out

    monkeypatch.setattr(reference, "shrink_groups", wrong)


def plant_stale_last_element(monkeypatch):
    right = reference._run_entry

    def wrong(rule, penalty, entry, *more):
        old = entry.param.detach().clone()
        right(rule, penalty, entry, *more)
        index = (-1,) * old.ndim
        entry.param[index] = old[index]

    monkeypatch.setattr(reference, "_run_entry", wrong)


def plant_wrong_threshold(monkeypatch):
    """Weights just above it die, on which no error of the result itself tells much."""
    right = reference.PROX["l1"]

    def wrong(v, step, terms):
        w = right(v, step, terms)
        return torch.where(v.abs() <= step * terms.elementwise * (1 + 1e-5), 0.0, w)

    monkeypatch.setitem(reference.PROX, "l1", wrong)


def plant_bits(monkeypatch, differs):
    """Plant a native step whose last row has other bits whenever `differs()`."""
    right = backends.native.run

    def wrong(batch):
        right(batch)
        if differs():
            for entry in batch.entries:
                entry.param[-1] *= 1 + torch.finfo(entry.param.dtype).eps

    monkeypatch.setattr(backends.native, "run", wrong)


@pytest.mark.skipif(backends.native.unavailable() is not None, reason="no native library")
def test_planted_differences_of_bits_are_found(monkeypatch):
    threads = torch.get_num_threads()
    runs = itertools.count()
    monkeypatch.setattr("tl1kernels.verify.PARTS", (checks._bits,))
    for section, differs in (
        ("bits, 1, 2, 4 threads", lambda: torch.get_num_threads() == 4),
        ("bits", lambda: next(runs) % 7 == 0),
    ):
        with monkeypatch.context() as patch:
            plant_bits(patch, differs)
            failed = {c.section for c in verify("cpu", 3, ["l1"]).checks if not c.passed}
        assert section in failed
        assert torch.get_num_threads() == threads


@pytest.mark.skipif(backends.native.unavailable() is not None, reason="no native library")
def test_a_planted_threshold_is_found_by_what_dies(monkeypatch):
    """On the other side, the reference: what a backend gives is compared with it."""
    plant_wrong_threshold(monkeypatch)
    wrong = [c for c in verify("cpu", 3, ["l1"]).checks if c.section == "zeros" and not c.passed]
    assert {check.dtype for check in wrong} == {"float32", "float64"}
    assert all(check.differing > 0 for check in wrong)
    assert "differ) FAIL" in str(verify("cpu", 3, ["l1"]))


@pytest.mark.skipif(backends.native.unavailable() is not None, reason="no native library")
def test_planted_random_bits_are_found(monkeypatch):
    """Other ones than the reference's; and such as never round up."""

    def failed(backend):
        return {c.section for c in verify(backend, 3, ["l1", None]).checks if not c.passed}

    right = backends.native.run

    def with_another_seed(batch):
        batch.seed = None if batch.seed is None else batch.seed + 1
        right(batch)

    with monkeypatch.context() as patch:
        patch.setattr(backends.native, "run", with_another_seed)
        assert failed("cpu") == {"stochastic rounding, bits"}
    monkeypatch.setattr(reference, "random_bits", lambda key, place: torch.zeros_like(place))
    assert failed("reference") == {"stochastic rounding, on average"}


def plant_nan(monkeypatch):
    right = reference.PROX["l1"]
    monkeypatch.setitem(
        reference.PROX, "l1", lambda v, step, terms: right(v, step, terms) * float("nan")
    )


def plant_doubled_eps(monkeypatch):
    right = reference.adam

    def wrong(rule, p, g, state, s):
        return right(rule, p, g, state, {**s, "eps": s["eps"] * 2})

    monkeypatch.setattr(reference, "adam", wrong)


@pytest.mark.parametrize(
    "plant",
    [
        plant_wrong_coefficient,
        plant_wrong_group_scale,
        plant_stale_last_element,
        plant_nan,
        plant_doubled_eps,
    ],
)
def test_a_planted_error_fails(monkeypatch, capsys, plant):
    plant(monkeypatch)
    assert (
        cli.main(["verify", "--penalty", "tl1", "l1", "--seed", "3", "--backend", "reference"]) == 1
    )
    *_, failed = capsys.readouterr().out.split("\n\n")
    summary, *lines, again = failed.splitlines()
    passed, of = (int(word) for word in summary.split() if word.isdigit())
    assert len(lines) == of - passed > 0
    assert all(re.fullmatch(r"FAIL .*, b?float\d\d: \S+, bound \S+ .+", line) for line in lines)
    assert again == "the same command with --seed 3 repeats it"


def test_the_seed_repeats_the_report():
    assert verify("reference", 5, ["l1"]) == verify("reference", 5, ["l1"])


def test_json_from_the_command_line(capsys):
    assert cli.main(["verify", "--seed", "1", "--json", "--penalty", "none", "l0"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert report["seed"] == 1
    assert all(check["passed"] for check in report["checks"])


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_what_a_backend_lacks_is_said_and_not_passed(backend, monkeypatch, capsys):
    reason = backends.BACKENDS[backend].unavailable()
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr("tl1kernels.verify.PARTS", ())
    lacking = ON_THE_REFERENCE_ALONE[backend]
    report = verify(backend)
    assert set(report.lacking) == lacking
    assert all(name in str(report) for name in lacking)
    for name in lacking:
        assert cli.main(["verify", "--backend", backend, "--penalty", name]) == 2
        error = capsys.readouterr().err
        assert "--penalty must be among none, " in error
        assert f"for backend {backend!r}, got '{name}'" in error
        with pytest.raises(ValueError, match=rf"penalties must be among .*, got '{name}'"):
            verify(backend, penalties=[name])


def test_a_device_that_is_not_there_is_named(capsys):
    for backend, device in (("reference", "cuda:99"), ("reference", "tpu"), ("cpu", "cuda")):
        if backends.BACKENDS[backend].unavailable():
            continue
        assert cli.main(["verify", "--backend", backend, "--device", device]) == 2
        error = capsys.readouterr().err
        assert "--device must be among cpu" in error
        assert f"for backend {backend!r}, got {device!r}" in error
        with pytest.raises(ValueError, match=rf"device must be among \['cpu'.*, got '{device}'"):
            verify(backend, device=device)


@pytest.mark.parametrize("group_by", [None, "out"])
@pytest.mark.parametrize("penalty", [None, *tk.PENALTIES])
def test_what_is_not_undecided_does_not_jump(penalty, group_by):
    """At kinks and ties, where a rounding of v may move the prox far, it says so; not elsewhere."""
    if group_by is None and penalty in COUPLED:
        pytest.skip("it needs groups")
    generator = np.random.default_rng(7)
    step, mu, a, shape, size = 0.3, 0.6, 1.5, (40, 3), 1e-9
    jumped = decided = 0
    for lam in (0.1, 1.0, 3.0):
        v = generator.normal(size=shape).round(1)  # with ties
        special = [0.5]
        if penalty in oracles.ORACLES:
            special = oracles.ORACLES[penalty].kinks(step, lam * mu, a)
        near = generator.choice([-9, -0.5, 0, 0.5, 9], shape) * size + generator.choice(
            special, shape
        )
        v = np.where(generator.random(shape) < 0.3, near, v)
        terms = step, lam * mu, penalty, a, group_by
        options = {"lam": lam, "mu": mu, "penalty": penalty, "a": a, "group_by": group_by}
        maybe = oracles.undecided(v, np.full(shape, size), *terms)
        magnified = oracles.condition(v, *terms) if penalty else 1.0
        before = oracles.prox_as_published(v, step, **options)
        for _ in range(10):
            moved = v + generator.choice([-1, 1], shape) * size
            change = np.abs(oracles.prox_as_published(moved, step, **options) - before)
            assert (change[~maybe] <= (20 * magnified * np.ones(shape) * size)[~maybe]).all()
            jumped += (change > 0.01).sum()
        decided += (~maybe).sum()
    assert decided > 60
    jumps = "tl1", "l0", "log", "capped_l1", "l_half", "l_two_thirds", "l1_minus_l2"
    assert (jumped > 0) == (penalty in jumps)


def test_what_a_rounding_does_not_change_is_decided():
    """Weights off the kinks; largest weights that tie where both of them stay, or that do not."""
    v = np.array([[2.0, 2.0, 0.3], [0.05, -0.05, 0.01], [0.07, 0.01, 0.02]])
    error = np.full(v.shape, 1e-9)
    tied = oracles.undecided(v, error, 1.0, 0.1, "l1_minus_l2", 1.0, "out")
    assert tied.all(1).tolist() == tied.any(1).tolist() == [False, True, False]
    v[0, 0] = 0.1  # l1's kink
    at = np.array([[True, False, False], [False] * 3, [False] * 3])
    assert (oracles.undecided(v, error, 1.0, 0.1, "l1", 1.0, None) == at).all()
    assert (oracles.undecided(v, error, 1.0, 0.1, "l1", 1.0, "out") == at.any(1)[:, None]).all()
    assert not oracles.undecided(v, error, 1.0, 0.1, None, 1.0, "out").any()


def test_the_percentile_is_of_the_errors():
    of = [np.arange(1.0, 2001.0)]
    check = checks._check("section", "row", torch.float32, "nothing", of, 5000.0)
    assert (check.error, check.p999, check.cases) == (2000.0, 1998.0, 2000)
    assert "2e+03 / 2e+03" in str(Report("cpu", 0, (check,)))


def test_an_unknown_backend_or_penalty_is_named_as_it_is_typed(capsys):
    assert cli.main(["verify", "--backend", "abacus"]) == 2
    assert "--backend must be among cpu, triton, " in (error := capsys.readouterr().err)
    assert "got 'abacus'" in error
    assert cli.main(["verify", "--penalty", "l1", "ridge"]) == 2
    assert "--penalty must be among none, tl1, l1, " in (error := capsys.readouterr().err)
    assert "got 'ridge'" in error


def test_zeros_that_all_agree_are_a_check_of_every_weight(monkeypatch):
    monkeypatch.setattr("tl1kernels.verify.PARTS", (checks._many,))
    zeros = [check for check in verify("reference", 0, ["l1"]).checks if check.section == "zeros"]
    assert [(c.cases, c.differing, c.error, c.p999) for c in zeros] == [(2500, 0, 0, 0)] * 2


def test_a_missing_extra_is_named(monkeypatch, capsys):
    """The smallest that has what is missing."""
    for name in [name for name in sys.modules if name.startswith("tl1kernels.verify")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "tl1kernels.oracles")
    monkeypatch.delattr("tl1kernels.oracles")
    monkeypatch.setitem(sys.modules, "mpmath", None)
    assert cli.main(["verify"]) == 2
    assert "pip install 'tl1kernels[verify]'" in capsys.readouterr().err


def test_input_is_fresh_and_the_callers_generator_untouched(monkeypatch):
    monkeypatch.setattr("tl1kernels.verify.PARTS", (checks._many, checks._roundings))
    before = torch.get_rng_state()
    assert verify("reference", None, ["l1"]).seed != verify("reference", None, ["l1"]).seed
    assert torch.equal(torch.get_rng_state(), before)


def test_a_penalty_is_added_by_the_readmes_recipe(monkeypatch):
    """MCP by another name: not a weight times a function, and not valid at every step size."""

    def value(w, weight, a):
        size = w.abs()
        inner = weight * size - size**2 / (2 * a)
        return torch.where(size <= a * weight, inner, a * weight**2 / 2).sum()

    def check(a, step):
        return None if a > step else f"firm needs a > step, which is {step}"

    def firm_threshold(v, step, weight, a):
        inner = ((v - step * weight) / (1 - step / a)).clamp(min=0)
        return torch.where(v <= a * weight, inner, v)

    def again(w, weight, a):
        return weight * w - w**2 / (2 * a) if w <= a * weight else a * weight**2 / 2

    def published(v, step, weight, a):
        return v if v > a * weight else max(v - step * weight, 0) * a / (a - step)

    def kinks(step, weight, a):
        return step * weight, a * weight

    def condition(v, step, weight, a):
        return a / (a - step)

    row = Penalty("firm", "Gao & Bruce 1997", value, a=2.0, check=check)
    monkeypatch.setitem(tk.PENALTIES, "firm", row)
    monkeypatch.setitem(reference.PROX, "firm", reference.thresholded(firm_threshold))
    oracle = oracles.Oracle(again, published, kinks, condition)
    monkeypatch.setitem(oracles.ORACLES, "firm", oracle)
    with pytest.raises(ValueError, match=r"a=0.2 with step=0.3: firm needs a > step"):
        tk.prox(torch.ones(2), 0.3, penalty="firm", a=0.2)
    with pytest.raises(ValueError, match=r"a=0.2 with lr=0.3"):
        tk.ProxSGD([torch.ones(2, 2, requires_grad=True)], lr=0.3, lam=1, penalty="firm", a=0.2)
    w = torch.linspace(-2, 2, 41).double()
    want = sum(again(abs(x), 0.5, 2.0) for x in w.tolist())
    assert tk.penalty_value(w, lam=0.5, penalty="firm", a=2.0).item() == pytest.approx(want)
    report = verify("reference", 0, ["firm"])
    assert report.passed, str(report)
    assert any("prox firm" in check.what for check in report.checks)


def test_the_seed_0_is_one(monkeypatch):
    monkeypatch.setattr("tl1kernels.verify.PARTS", ())
    assert [verify("reference", seed).seed for seed in (0, 1)] == [0, 1]


def test_a_report_of_no_checks_has_not_passed():
    assert not Report("cpu", 0, ()).passed
    assert Report("cpu", 0, (checks._check("s", "r", torch.float32, "", [[0.5]], 0.5),)).passed


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_penalties_that_were_not_asked_for_are_not_lacking(backend, monkeypatch):
    if backends.BACKENDS[backend].unavailable():
        pytest.skip(backend)
    monkeypatch.setattr("tl1kernels.verify.PARTS", ())
    report = verify(backend, penalties=["l1"])
    assert report.lacking == ()
    assert "not checked" not in str(report)


def test_the_bounds_are_those_that_the_readme_promises():
    readme = " ".join((Path(__file__).parents[1] / "README.md").read_text().split())
    of = bounds.NATIVE.prox[torch.float32], bounds.NATIVE.step[torch.float32]
    on_gpu = bounds.GPU.step[torch.float32], bounds.GPU.step[torch.bfloat16]
    assert f"| prox, float32 | rounded once | {of[0]:g} ulp" in readme
    assert f"a whole float32 step to {of[1]:g} ulp of |v|, on a GPU to {on_gpu[0]:g}:" in readme
    assert f"half an ulp of bfloat16 that may be {on_gpu[1]:g}." in readme


SECTIONS = {
    *("prox", "zeros", "many weights", "tensors", "20 steps, lam = 0", "stochastic rounding"),
    "large tensors",
}


@pytest.mark.skipif(backends.native.unavailable() is not None, reason="no native library")
def test_every_section_finds_a_planted_error(monkeypatch):
    """A step size that is a thousandth too large: of rules, thresholds and groups alike."""
    right = backends.native.scalar_table

    def wrong(batch, names):
        table = right(batch, names)
        table[:, names.index("lr")] *= 1.001
        return table

    monkeypatch.setattr(backends.native, "scalar_table", wrong)
    failed = {check.section for check in verify("cpu", 3, ["l1", None]).checks if not check.passed}
    assert failed >= SECTIONS | {f"step {rule}" for rule in RULES}


def _a_stale_tail(batch):
    for entry in batch.entries:
        if entry.param.numel() > 720:
            entry.param[:, -1] = 0


def _wrong_wide_state(batch):
    for entry in batch.entries:
        for name in batch.rule.state:
            if entry.param.dtype == torch.float32:
                entry.state[name].mul_(1.001)


def _lost_state(batch):
    for entry in batch.entries:
        for name in batch.rule.state if entry.terms.elementwise + entry.terms.group > 0 else ():
            entry.state[name].zero_()


@pytest.mark.skipif(backends.native.unavailable() is not None, reason="no native library")
@pytest.mark.parametrize("spoil", [_a_stale_tail, _wrong_wide_state, _lost_state])
def test_what_a_step_leaves_wrong_in_large_tensors_and_in_state_is_found(monkeypatch, spoil):
    monkeypatch.setattr("tl1kernels.verify.PARTS", (checks._large,))
    run = backends.native.run
    monkeypatch.setattr(backends.native, "run", lambda batch: (run(batch), spoil(batch)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other tests have the cores
    try:
        assert not verify("cpu", penalties=["tl1"]).passed
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(backends.native.unavailable() is not None, reason="no native library")
def test_large_tensors_take_two_sweeps_where_small_ones_take_one():
    with tk.use_backend("cpu"):
        shape = checks._large_shape()
    for group_by in ("in", "layer"):
        view = view_of(torch.empty(shape), group_by)
        tiles = torch.ops.tl1kernels.cpu_tiles(view.blocks, view.outer, view.groups, view.inner)
        assert set(tiles[::7]) == {2}


def test_a_planted_error_of_weighted_groups_is_found(monkeypatch):
    right = Regularizer.terms

    def wrong(self, view):
        terms = right(self, view)
        return terms._replace(group=terms.group * (1 + 1e-6 * (self.group_weight == "sqrt")))

    monkeypatch.setattr(Regularizer, "terms", wrong)
    failed = {check.section for check in verify("reference", 3, ["l1"]).checks if not check.passed}
    assert failed == {"tensors"}
