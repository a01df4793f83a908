"""verify: passes on the truth, fails on planted errors, and can be repeated."""

import json

import pytest
import torch

from tl1kernels import cli
from tl1kernels.backends import reference
from tl1kernels.verify import verify


def test_the_reference_passes():
    report = verify("reference")
    assert report.passed, str(report)
    assert len(report.checks) > 30


def plant_wrong_coefficient(monkeypatch):
    right = reference.prox_tl1
    wrong = lambda v, step, weight, a: right(v, step, weight * (1 + 1e-6), a)  # noqa: E731
    monkeypatch.setattr(reference, "PROX", {**reference.PROX, "tl1": wrong})


def plant_wrong_group_scale(monkeypatch):
    right = reference.shrink_groups

    def wrong(t, view, tau):
        out = right(t, view, tau).clone()
        if view.n_groups > 1:
            view.split(out)[-1, :, -1] *= 1 + 1e-6
        return out

    monkeypatch.setattr(reference, "shrink_groups", wrong)


def plant_stale_last_element(monkeypatch):
    right = reference._run_entry

    def wrong(rule, entry):
        old = entry.param.detach().clone()
        right(rule, entry)
        index = (-1,) * old.ndim
        entry.param[index] = old[index]

    monkeypatch.setattr(reference, "_run_entry", wrong)


def plant_nan(monkeypatch):
    right = reference.prox_l1
    wrong = lambda v, step, weight, a: right(v, step, weight, a) * float("nan")  # noqa: E731
    monkeypatch.setattr(reference, "PROX", {**reference.PROX, "l1": wrong})


def plant_forgotten_bias_correction(monkeypatch):
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
        plant_forgotten_bias_correction,
    ],
)
def test_a_planted_error_fails(monkeypatch, capsys, plant):
    plant(monkeypatch)
    assert cli.main(["verify", "--seed", "3"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_the_seed_repeats_the_report():
    assert verify("reference", 5) == verify("reference", 5)


def test_json_from_the_command_line(capsys):
    assert cli.main(["verify", "--seed", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert report["seed"] == 1
    assert all(check["passed"] for check in report["checks"])


def test_an_unknown_backend_is_named(capsys):
    assert cli.main(["verify", "--backend", "abacus"]) == 2
    assert "'abacus'" in capsys.readouterr().err


def test_input_is_fresh():
    assert verify("reference").seed != verify("reference").seed
    assert torch.initial_seed() == 0  # the caller's generator is not touched
