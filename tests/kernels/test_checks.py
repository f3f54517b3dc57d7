"""Checks run once for a layout, and never let another one pass for it."""

from __future__ import annotations

import pytest
import torch

from arkvale_kernels import checks


@pytest.fixture
def counted():
    """A check of two arguments, and the layouts it ran for."""
    ran: list[tuple[int, ...]] = []

    @checks.by_layout
    def check(tensor, others, kind="a"):
        ran.append(tuple(tensor.shape))
        checks.check_shape("tensor", tensor, (None, 4))
        if kind != "a":
            raise ValueError(f"kind {kind!r} is unknown")

    return check, ran


def test_a_layout_that_passed_is_not_checked_again(counted):
    check, ran = counted
    for _ in range(3):
        check(torch.zeros(2, 4), (None, torch.ones(3)), "a")
    assert len(ran) == 1
    check(torch.zeros(3, 4), (None, torch.ones(3)), "a")
    assert len(ran) == 2


@pytest.mark.parametrize(
    "tensor, other",
    [
        (torch.zeros(4, 2).t(), torch.ones(3)),
        (torch.zeros(2, 4).double(), torch.ones(3)),
        (torch.zeros(2, 4).to("meta"), torch.ones(3)),
        (torch.zeros(9)[1:].view(2, 4), torch.ones(3)),
        (torch.zeros(2, 4), torch.ones(4)),
        (torch.zeros(2, 4), None),
    ],
)
def test_strides_dtype_device_alignment_and_nested_tensors_make_a_layout(counted, tensor, other):
    check, ran = counted
    check(torch.zeros(2, 4), (None, torch.ones(3)), "a")
    check(tensor, (None, other), "a")
    assert len(ran) == 2


def test_what_failed_fails_again(counted):
    check, _ = counted
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^tensor must have shape"):
            check(torch.zeros(2, 5), (), "a")
        with pytest.raises(ValueError, match=r"^kind 'b' is unknown"):
            check(torch.zeros(2, 4), (), "b")


def test_debugging_checks_every_time(counted, monkeypatch):
    """Ids in a tensor are no part of its layout."""
    check, ran = counted
    monkeypatch.setattr(checks, "DEBUG", True)
    for _ in range(2):
        check(torch.zeros(2, 4), (), "a")
    assert len(ran) == 2


def test_layouts_are_forgotten_rather_than_piled_up(counted, monkeypatch):
    check, ran = counted
    monkeypatch.setattr(checks, "_REMEMBERED", 4)
    for rows in (1, 2, 3, 4, 5, 5, 1):
        check(torch.zeros(rows, 4), (), "a")
    assert [shape[0] for shape in ran] == [1, 2, 3, 4, 5, 1]
