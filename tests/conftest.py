import os

import hypothesis
import pytest
import torch

# Pick the examples from the test's own code, not from a clock: a red run can be repeated.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch):
    monkeypatch.delenv("TL1KERNELS_BACKEND", raising=False)
    torch.manual_seed(0)
