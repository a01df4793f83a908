"""Choosing a backend: by name, by environment, by preference; never in silence."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import tl1kernels as tk
from tl1kernels import backends, plan
from tl1kernels.backends import native
from tl1kernels.batch import SGD, Assign, Entry
from tl1kernels.penalties import Regularizer
from tl1kernels.views import view_of


def entry(dtype=torch.float32, **options):
    p = torch.ones(2, 2, dtype=dtype)
    return Entry(p, p, view_of(p, None), {"lr": 0.1}, Regularizer.of(options))


@pytest.fixture
def picky(monkeypatch):
    """Add a second backend, preferred on the CPU, which takes float32 only."""
    ran = []
    module = SimpleNamespace(
        unavailable=lambda: None,
        rejects=lambda batch: None if batch.dtype == torch.float32 else f"not {batch.dtype}",
        run=lambda batch: ran.append(batch),
    )
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "picky": module})
    monkeypatch.setattr(backends, "PREFERENCE", {"cpu": ("picky", "reference")})
    monkeypatch.setattr(backends, "_warned", set())
    module.ran = ran
    return module


def test_preference_and_one_warning_for_falling_back(picky):
    assert plan.run([(Assign(), entry())]) == ["picky"]
    with pytest.warns(RuntimeWarning, match=r"'picky' passed over: not torch.float64"):
        assert plan.run([(Assign(), entry(torch.float64))]) == ["reference"]
    assert plan.run([(Assign(), entry(torch.float64))]) == ["reference"]  # warnings are errors here


def test_a_backend_asked_for_by_name_does_not_fall_back(picky):
    with pytest.raises(RuntimeError, match=r"'picky' cannot run this step: not torch.float64"):
        tk.prox(torch.ones(2).double(), 0.1, backend="picky")
    picky.unavailable = lambda: "it was not built"
    with pytest.raises(RuntimeError, match="'picky' cannot run here: it was not built"):
        tk.prox(torch.ones(2), 0.1, backend="picky")


def test_a_refusal_of_one_batch_leaves_the_others_untouched(picky):
    first, second = entry(), entry(torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        plan.run([(Assign(), first), (Assign(), second)], "picky")
    assert not picky.ran


def test_argument_before_context_before_environment_before_preference(picky, monkeypatch):
    monkeypatch.setenv("TL1KERNELS_BACKEND", "reference")
    assert plan.run([(Assign(), entry())]) == ["reference"]
    with tk.use_backend("picky"):
        assert plan.run([(Assign(), entry())]) == ["picky"]
        assert plan.run([(Assign(), entry())], "reference") == ["reference"]
    assert plan.run([(Assign(), entry())]) == ["reference"]


def test_unknown_names():
    message = r"backend must be None or one of 'reference', got 'abacus'"
    with pytest.raises(ValueError, match=message), tk.use_backend("abacus"):
        pass


def test_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv("TL1KERNELS_BACKEND", "abacus")
    with pytest.raises(ValueError, match="'abacus'"):
        tk.prox(torch.ones(2), 0.1)


def test_one_batch_for_each_device_dtype_rule_and_penalty():
    work = [
        (SGD(), entry(lam=0.1)),
        (SGD(), entry(torch.float64, lam=0.1)),
        (SGD(), entry(lam=0.3, a=2.0)),
        (SGD(momentum=True), entry(lam=0.1)),
        (SGD(), entry(lam=0.1, penalty="l1")),
        (SGD(), entry(lam=0.0, penalty="l1")),
        (SGD(), entry(lam=0.0)),
    ]
    batches = plan.make_batches(work)
    assert [len(batch.entries) for batch in batches] == [2, 1, 1, 1, 2]
    assert [batch.penalty for batch in batches] == ["tl1", "tl1", "tl1", "l1", None]


def test_info_says_what_runs_and_why_not():
    report = tk.info()
    assert report.runs_on["cpu"] == "reference"
    assert report.backends["reference"] == "available"
    assert report.versions["torch"] == torch.__version__
    assert json.loads(json.dumps(report.as_dict()))
    assert "reference" in str(report)
    assert report.library.startswith("loads" if native.unavailable() is None else "not built")


def test_a_missing_library_says_why_on_use_and_not_on_import(monkeypatch, tmp_path):
    native.load.cache_clear()
    monkeypatch.setattr(tk, "__path__", [str(tmp_path)])
    assert native.unavailable() == "not built: the package was not installed by pip"
    (tmp_path / native.REPORT).write_text("no compiler\n")
    with pytest.raises(FileNotFoundError, match="not built: no compiler"):
        native.build_info()
    (tmp_path / native.LIBRARY).write_text("not a library")
    assert "file too short" in native.unavailable() or "invalid ELF" in native.unavailable()
    native.load.cache_clear()


def test_info_from_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "tl1kernels", "info", "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)["runs_on"]["cpu"] == "reference"


def test_nothing_optional_is_imported_with_the_package():
    code = (
        "import sys, tl1kernels; "
        "print([m for m in ('sklearn', 'matplotlib', 'rich', 'mpmath.libmp', 'triton') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
