"""Choosing a backend: by name, by environment, by preference; never in silence."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import SimpleNamespace

import pytest
import torch

import tl1kernels as tk
from tests.common import ELEMENTWISE, skip_unless_it_runs
from tl1kernels import backends, plan
from tl1kernels.backends import native
from tl1kernels.batch import SGD, Adam, Assign, Entry, Numbers
from tl1kernels.penalties import Terms
from tl1kernels.views import view_of


def work(dtype=torch.float32, rule=SGD(), penalty="tl1", lam=0.1):  # noqa: B008
    p = torch.ones(2, 2, dtype=dtype)
    scalars = {"lr": 0.1, "weight_decay": 0.0}
    return rule, penalty, Entry(p, view_of(p, None), Numbers(scalars, Terms(lam, 0.0, 1.0))), p


needs_cpu = pytest.mark.skipif(native.unavailable() is not None, reason="no native library")


def chosen(*items, backend=None):
    """Return the backends that would run this."""
    return [name for name, _ in plan.prepare(items, backend)]


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
    assert chosen(work()) == ["picky"]
    with pytest.warns(RuntimeWarning, match=r"'picky' passed over: not torch.float64"):
        assert chosen(work(torch.float64)) == ["reference"]
    assert chosen(work(torch.float64)) == ["reference"]  # warnings are errors here


def test_a_backend_asked_for_by_name_does_not_fall_back(picky):
    with pytest.raises(RuntimeError, match=r"'picky' cannot run this step: not torch.float64"):
        tk.prox(torch.ones(2).double(), 0.1, backend="picky")
    picky.unavailable = lambda: "it was not built"
    with pytest.raises(RuntimeError, match="'picky' cannot run here: it was not built"):
        tk.prox(torch.ones(2), 0.1, backend="picky")


def test_the_reference_refuses_devices_without_float64():
    (_, batch) = plan.prepare([work()])[0]
    batch.device = torch.device("mps")
    assert backends.reference.rejects(batch) == "mps has no float64"


def test_a_device_that_no_backend_takes_is_an_error(monkeypatch):
    monkeypatch.setattr(backends, "PREFERENCE", {})
    monkeypatch.setattr(backends.reference, "rejects", lambda batch: "it has no float64")
    with pytest.raises(RuntimeError, match=r"no backend for cpu: .*'reference'.*no float64"):
        tk.prox(torch.ones(2), 0.1)


def test_use_backend_none_chooses_by_device_whatever_is_around_it(picky, monkeypatch):
    monkeypatch.setenv("TL1KERNELS_BACKEND", "abacus")
    with tk.use_backend("reference"), tk.use_backend(None):
        assert chosen(work()) == ["picky"]


def test_argument_before_context_before_environment_before_preference(picky, monkeypatch):
    monkeypatch.setenv("TL1KERNELS_BACKEND", "reference")
    assert chosen(work()) == ["reference"]
    with tk.use_backend("picky"):
        assert chosen(work()) == ["picky"]
        assert chosen(work(), backend="reference") == ["reference"]
    assert chosen(work()) == ["reference"]


def test_unknown_names():
    message = r"backend must be None or one of 'cpu', 'triton', 'cuda', 'reference', got 'abacus'"
    with pytest.raises(ValueError, match=message):
        tk.use_backend("abacus")  # without `with` too


@pytest.mark.parametrize("name", [["cpu"], [], {}, 3])
def test_what_is_no_name_is_refused_as_an_unknown_name_is(name):
    message = re.escape(
        f"backend must be None or one of 'cpu', 'triton', 'cuda', 'reference', got {name!r}"
    )
    with pytest.raises(ValueError, match=message):
        tk.use_backend(name)
    with pytest.raises(ValueError, match=message):
        tk.prox(torch.ones(2), 0.1, backend=name)


def test_use_backend_is_of_its_thread_alone():
    with tk.use_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert backends.asked_for() == "reference"
        assert pool.submit(backends.asked_for).result() is None


def test_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv("TL1KERNELS_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"TL1KERNELS_BACKEND must be .*'abacus'"):
        tk.prox(torch.ones(2), 0.1)


def test_one_batch_for_each_device_dtype_rule_and_penalty():
    items = [
        work(),
        work(torch.float64),
        work(lam=0.3),
        work(rule=SGD(momentum=True)),
        work(penalty="l1"),
        work(penalty="l1", lam=0.0),  # a number, not a variant
        work(penalty=None),
    ]
    batches = [batch for _, batch in plan.prepare(items)]
    assert [len(batch.entries) for batch in batches] == [2, 1, 1, 2, 1]
    assert [batch.penalty for batch in batches] == ["tl1", "tl1", "tl1", "l1", None]


def test_info_says_what_runs_and_why_not():
    report = tk.info()
    missing = native.unavailable()
    assert report.runs_on["cpu"] == ("reference" if missing else "cpu")
    assert report.backends["cpu"] == (missing or "available")
    assert report.backends["reference"] == "available"
    assert report.versions["torch"] == torch.__version__
    assert json.loads(json.dumps(report.as_dict()))
    assert "reference" in str(report)
    assert report.native.startswith("C++ 20" if missing is None else "not built")


def test_info_tells_what_is_wrong_with_the_environment(monkeypatch):
    monkeypatch.setenv("TL1KERNELS_BACKEND", "abacus")
    report = tk.info()
    assert report.runs_on["cpu"] == "nothing: 'abacus' was asked for: no such backend"
    assert report.asked_for == "abacus"
    monkeypatch.setenv("TL1KERNELS_BACKEND", "reference")
    assert tk.info().runs_on["cpu"] == "reference"


@needs_cpu
@pytest.mark.parametrize("backend", ["", "cpu"])
def test_an_unknown_build_is_one_sentence_from_a_step_and_in_info(backend, monkeypatch):
    monkeypatch.setenv("TL1KERNELS_BACKEND", backend)
    monkeypatch.setenv("TL1KERNELS_CPU", "abacus")
    names = ", ".join(map(repr, torch.ops.tl1kernels.cpu_builds().split()))
    message = f"TL1KERNELS_CPU must be one of {names} on this processor, got 'abacus'"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        tk.prox(torch.ones(2), 0.1)
    report = tk.info()
    assert report.runs_on["cpu"] == f"nothing: {message}"
    assert report.native.endswith(f"; {message}")
    with tk.use_backend("reference"):
        assert tk.info().runs_on["cpu"] == "reference"


@pytest.mark.parametrize("rule", [Assign, SGD, Adam])
@pytest.mark.parametrize("penalty", [None, *ELEMENTWISE])
@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_every_backend_takes_every_rule_and_penalty(backend, rule, penalty):
    skip_unless_it_runs(backend)
    assert chosen(work(rule=rule(), penalty=penalty), backend=backend) == [backend]


@pytest.fixture
def loaded_anew(monkeypatch):
    """Of what has been loaded nothing is remembered, and what the test loads is forgotten."""
    monkeypatch.setattr(native, "load", cache(native.load.__wrapped__))


def test_a_missing_library_says_why_on_use_and_not_on_import(loaded_anew, monkeypatch, tmp_path):
    monkeypatch.setattr(tk, "__path__", [str(tmp_path)])
    assert native.unavailable() == "not built: the package was not installed by pip"
    (tmp_path / native.REPORT).write_text("no compiler\n")
    with pytest.raises(FileNotFoundError, match="not built: no compiler"):
        native.build_info()
    (tmp_path / native.BINARY).write_text("not a library")
    assert str(tmp_path / native.BINARY) in native.unavailable()


def test_without_the_library_one_warning_says_why_and_the_reference_runs(
    loaded_anew, monkeypatch, tmp_path
):
    monkeypatch.setattr(tk, "__path__", [str(tmp_path)])
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match=r"'cpu' passed over: not built.*'reference' runs"):
        assert chosen(work()) == ["reference"]
    tk.prox(torch.ones(3), 0.1)  # and no second one: warnings are errors here


@needs_cpu
def test_a_penalty_without_a_kernel_runs_on_the_reference_with_one_warning(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    v = torch.randn(3, 4)
    with pytest.warns(RuntimeWarning, match="no penalty 'exclusive'.*'reference' runs"):
        got = tk.prox(v, 0.1, penalty="exclusive", group_by="in")
    assert torch.equal(got, tk.prox(v, 0.1, penalty="exclusive", group_by="in"))
    want = tk.prox(v, 0.1, penalty="exclusive", group_by="in", backend="reference")
    assert torch.equal(got, want)


@needs_cpu
def test_cpu_tensors_run_on_the_library_and_the_reference_is_reached_by_name(monkeypatch):
    assert chosen(work()) == ["cpu"]
    with tk.use_backend("reference"):
        assert chosen(work()) == ["reference"]
    monkeypatch.setenv("TL1KERNELS_BACKEND", "reference")
    assert chosen(work()) == ["reference"]


def test_info_from_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "tl1kernels", "info", "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)["runs_on"] == tk.info().runs_on


def test_nothing_optional_is_imported_with_the_package():
    code = (
        "import sys, tl1kernels; "
        "print([m for m in ('sklearn', 'matplotlib', 'rich', 'mpmath.libmp', 'triton') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@needs_cpu
def test_what_the_library_rejects():
    p, view = torch.ones(2, 2), view_of(torch.ones(2, 2), None)
    plain, scale = {"lr": 0.1, "weight_decay": 0.0}, torch.tensor(0.1)
    for scalars, terms, grad, why in (
        (plain, Terms(0.1, 0.0, 1.0), p.double(), r"a gradient of torch\.float64 for .*float32"),
        (plain, Terms(0.1, 0.0, 1.0, scale), p, "lr or lam on a device"),
        ({**plain, "lr": scale}, Terms(0.1, 0.0, 1.0), p, "lr or lam on a device"),
    ):
        entry = Entry(p, view, Numbers(scalars, terms))
        with pytest.raises(RuntimeError, match=f"'cpu' cannot run this step: {why}"):
            plan.prepare([(SGD(), "tl1", entry, grad)], "cpu")
