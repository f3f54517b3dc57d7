"""Decode steps with fixed addresses and shapes, so that a CUDA graph can be captured over them.

A step is planned as always and then copied into buffers that the graph reads.  There are two
graphs per batch size: a *calm* one, for steps in which nothing is chosen and nothing can be
missing, which costs nothing over plain paged attention, and a general one for all others.
"""

from __future__ import annotations

import dataclasses

import torch

from arkvale_sglang.runtime.cache import PagedCache
from arkvale_sglang.runtime.decode import DecodeStep, Wave


class DecodeGraph:
    """The buffers of all captured steps; larger batches lend theirs to smaller ones."""

    def __init__(self, cache: PagedCache, rows: int, row_pages: int):
        """For at most ``rows`` rows of at most ``row_pages`` pages."""
        self._cache = cache
        groups, device = cache.plan.geometry.groups, cache.store.device
        lane_rows = rows * groups

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._pages = zeros(rows, row_pages)
        self._lane_pages = self._pages if groups == 1 else zeros(lane_rows, row_pages)
        self._lengths, self._slots = zeros(rows), zeros(rows).long()
        self._open_lane_pages, self._offsets = zeros(lane_rows), zeros(lane_rows)
        self._page_counts, self._attended = zeros(lane_rows), zeros(lane_rows)

    def load(self, step: DecodeStep, *, calm: bool) -> DecodeStep:
        """Copy a planned step of one wave into the buffers.

        Returns:
            The step over the buffers, of the same shapes and at the same addresses for every
            batch of so many rows in the same mode.
        """
        if len(step.waves) != 1 or (calm and not step.calm):
            raise RuntimeError("this step was not planned for the graph that is to replay it")
        wave = step.waves[0]
        rows, lane_rows = step.lengths.shape[0], wave.lengths.shape[0]
        for buffer, values in (
            (self._pages, step.pages),
            (self._lane_pages, wave.lane_pages),
            (self._lengths, step.lengths),
            (self._slots, step.slots),
            (self._open_lane_pages, step.open_lane_pages),
            (self._offsets, step.offsets),
            (self._page_counts, wave.page_counts),
            (self._attended, wave.lengths),
        ):
            target = buffer[: values.shape[0]]
            if values.dim() == 2:
                target = target[:, : values.shape[1]]
            target.copy_(values)
        width = self._cache.config.budget_pages if calm else self._lane_pages.shape[1]
        return dataclasses.replace(
            step,
            pages=self._pages[:rows],
            lengths=self._lengths[:rows],
            common_length=None,
            slots=self._slots[:rows],
            open_lane_pages=self._open_lane_pages[:lane_rows],
            offsets=self._offsets[:lane_rows],
            pressed=not calm,
            waves=[
                Wave(
                    settings=wave.settings,
                    requests=None,
                    lane_rows=slice(0, lane_rows),
                    lane_pages=self._lane_pages[:lane_rows, :width],
                    page_counts=self._page_counts[:lane_rows],
                    lengths=self._attended[:lane_rows],
                    common_length=None,
                    over_budget=not calm,
                    attention=wave.attention,
                )
            ],
        )
