"""Guarded tensors for the tests of all ops."""

from __future__ import annotations

import pytest

from arkvale_kernels.digest import kernel as digest
from arkvale_kernels.residency import kernel as residency
from arkvale_kernels.score import kernel as score
from arkvale_kernels.select import kernel as select
from arkvale_kernels.transfer import kernel as transfer
from support.guards import GuardedTorch, Guards


@pytest.fixture
def guards(monkeypatch):
    """Outputs that launchers allocate start as NaN between bands; all bands are checked at last."""
    held = Guards()
    for module in (digest, residency, score, select, transfer):
        monkeypatch.setattr(module, "torch", GuardedTorch(held))
    yield held
    held.check()


@pytest.fixture
def few_programs(monkeypatch):
    """A device so small that programs loop over several tiles each."""
    monkeypatch.setattr(score, "multiprocessors", lambda device: 0)
    monkeypatch.setattr(transfer, "multiprocessors", lambda device: 2)
