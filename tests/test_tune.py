"""bench/tune.py: what is varied makes a difference, is right, is put back, and is written down."""

import json

import pytest
import torch

from bench import tune
from tests.common import skip_unless_it_runs
from tl1kernels.backends import cuda_schedule, triton_schedule

KEPT = {
    "triton": {"as committed", "split_tile 2048 by 8 warps", "COLUMNS 128"},
    "cuda": {"as committed", "HELD 9216", "PANEL 32"},
}


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    skip_unless_it_runs(request.param)
    return request.param


def tuned(tmp_path, monkeypatch, backend, cases, *more):
    monkeypatch.setattr(tune, "cases", lambda *_: cases)
    options = ["--backend", backend, "--size", "96", "--rounds", "1", *more]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tune.main([*options, "--device", device, "--out", str(tmp_path / "tune.json")])


def columns(backend):
    shape = (200, 96)
    return tune.Case("columns", backend, "SGD", "in", torch.float32, (shape,))


def test_each_variant_is_timed_beside_the_committed_one(tmp_path, monkeypatch, capsys, backend):
    before = {knob.name: getattr(knob.module, knob.name) for knob in tune.KNOBS}
    assert tuned(tmp_path, monkeypatch, backend, [columns(backend)], "--workers", "1") == 0
    assert {knob.name: getattr(knob.module, knob.name) for knob in tune.KNOBS} == before
    (result,) = json.loads((tmp_path / "tune.json").read_text())["results"]
    rows = {row["variant"]: row for row in result["rows"]}
    assert set(rows) >= KEPT[backend]
    assert not any("resident_tile" in name for name in rows)  # columns do not depend on it
    assert rows["as committed"]["ratio"] == 1
    assert all(row["ms"] > 0 and row["of_copy"] > 0 for row in rows.values())
    printed = capsys.readouterr().out
    assert all(printed.count(f"  {name} ") for name in rows)


def test_a_variant_that_steps_otherwise_is_a_failure(tmp_path, monkeypatch, capsys, backend):
    """Planted: a schedule that forgets a tensor's last tile."""
    module = {"triton": triton_schedule, "cuda": cuda_schedule}[backend]
    items = module.items_of

    def fewer(index, kind, *counts):
        return items(index, kind, *counts)[:-1]

    monkeypatch.setattr(
        tune, "KNOBS", [tune.Knob(backend, module, "items_of", {"without the last": fewer})]
    )
    case = tune.Case("rows", backend, "SGD", "out", torch.float32, ((200, 96),))
    assert tuned(tmp_path, monkeypatch, backend, [case]) == 1
    assert "FAILED: items_of without the last" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "tune.json").read_text())["results"]
    assert [row["variant"] for row in result["rows"]] == ["as committed"]


def test_a_variant_that_cannot_step_fails_alone(monkeypatch, capsys, backend):
    """Neither the other variants nor the workers that compile end with it."""
    module = {"triton": triton_schedule, "cuda": cuda_schedule}[backend]
    items = module.items_of

    def refuse(*_):
        raise RuntimeError("out of shared memory")

    values = {"refused": refuse, "the same": items}
    monkeypatch.setattr(tune, "KNOBS", [tune.Knob(backend, module, "items_of", values)])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tune.compile_all(columns(backend), device)
    failed = []
    assert dict(tune.variants(columns(backend), device, failed)).keys() == {"as committed"}
    assert failed == ["items_of refused: out of shared memory"]


@pytest.mark.parametrize("backend_name", ["triton", "cuda"])
def test_every_view_rule_and_model_is_a_case(backend_name):
    every = list(tune.cases(backend_name, 8192))
    assert len({case.name for case in every}) == len(every) == 28
    assert {case.group_by for case in every} == {"out", "in", None, "auto"}
    assert sum(case.is_model for case in every) == 4
