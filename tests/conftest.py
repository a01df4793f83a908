import os

import hypothesis
import pytest
import torch

from tests.common import skip_unless_it_runs
from tl1kernels import backends

# Where there is no GPU, its kernels are tested on the host.
if not torch.cuda.is_available():
    os.environ.setdefault(backends.cuda.ENVIRONMENT, "emulated")

# Pick the examples from the test's own code, not from a clock: a red run can be repeated.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="module", params=backends.BACKENDS)
def each_backend(request):
    """Run a module's tests on every backend that this machine has."""
    skip_unless_it_runs(request.param)
    with backends.use_backend(request.param):
        yield request.param


def _kernels():
    if backends.native.unavailable():
        return ["triton", "cuda"]
    builds = torch.ops.tl1kernels.cpu_builds().split()
    return [*(f"cpu {build}" for build in builds), "triton", "cuda"]


@pytest.fixture(params=_kernels())
def kernels(request, monkeypatch):
    """Run a test on the native library for every instruction set, and for GPUs; the backend."""
    backend, _, build = request.param.partition(" ")
    skip_unless_it_runs(backend)
    if build:
        monkeypatch.setenv("TL1KERNELS_CPU", build)
        assert torch.ops.tl1kernels.cpu_build() == build
    with backends.use_backend(backend):
        yield backend


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch):
    monkeypatch.delenv("TL1KERNELS_BACKEND", raising=False)
    torch.manual_seed(0)
