"""Settings for every test: no network, one thread a worker, quiet libraries, bounded property tests."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Deterministic, so that a failure on one machine is a failure on all; no deadline, since the machine is shared.
settings.register_profile(
    "fxprune", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("fxprune")


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each xdist worker: two workers on two cores must not fight for them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, in whatever order tests run."""
    torch.manual_seed(0)
