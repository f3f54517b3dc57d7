"""Rules that never attend again to a page they left out, on the same digests, tables and kernels.

They stand for the policies without recall that users know, so that a comparison changes the rule
and nothing else.  Pages are their unit, digest scores their estimate of attention:

* ``streaming``: sinks and the latest pages (StreamingLLM);
* ``snapkv``: pages ranked once, by the prompt's last queries (SnapKV); later pages are kept;
* ``h2o``: attention accumulated from those queries on; what ranks lowest is lost (H2O).

Only rankings remember anything: one number per page, lane, layer and request that is being served.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from arkvale_kernels.layout import PagedLayer, SelectionRule
from arkvale_kernels.score import score_pages
from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.core.sizing import PoolPlan
from arkvale_sglang.policy.admission import selection_rule

OBSERVED_TOKENS = 32
"""Most queries at the end of a prompt that rank its pages (SnapKV's observation window): those of
its last chunk, which is shorter where nearly all of the prompt was cached."""


class Dropping:
    """Importance of every page of every request that is served by such a rule.

    +inf marks pages not ranked yet, -inf pages that are lost.
    """

    def __init__(self, plan: PoolPlan, sink_pages: int, device: torch.device):
        self._plan, self._device = plan, device
        # Sinks are always attended, so they take no part, here as in every step.
        self._ranked = SelectionRule(budget=sink_pages + 1, must=0, sinks=sink_pages, window=1)
        self._importance = torch.empty(0, device=device)

    def prepare(self, slots: torch.Tensor, settings: Iterable[ArkValeConfig]) -> None:
        """Make room when a request first needs it; ``slots`` is the engine's slot table."""
        if not self._importance.numel() and any(own.selection != "recall" for own in settings):
            geometry = self._plan.geometry
            requests, tokens = slots.shape
            shape = (requests, geometry.groups, -(-tokens // geometry.page_size))
            self._importance = torch.full(
                (geometry.managed_layers, *shape), math.inf, device=self._device
            )

    def observe(
        self,
        index: int,
        layer: PagedLayer,
        request: torch.Tensor,
        lane_pages: torch.Tensor,
        query: torch.Tensor,
        scaling: float,
    ) -> None:
        """Rank the pages of a prompt by its last queries, forgetting what the request slot held.

        Args:
            index: number of the layer among the managed ones.
            request: ``[1]`` int64 row of the engine's slot table.
            lane_pages: ``[groups, pages]`` int32, the sealed pages and one more column.
            query: ``[tokens, query heads, head_dim]``, the last of the prompt.
        """
        groups, columns = lane_pages.shape
        tokens = query.shape[0]
        rows = tokens * groups
        scores = score_pages(
            query.reshape(rows, -1, query.shape[-1]),
            layer.digests,
            layer.residency.frame_of,
            lane_pages.repeat(tokens, 1),
            torch.full((rows,), columns, dtype=torch.int32, device=query.device),
            self._ranked,
            head_reduce="softmax-mean",
            scaling=scaling,
        )
        importance = self._importance[index]
        row = importance.new_full((1, *importance.shape[1:]), math.inf)
        sealed = columns - 1
        if sealed:
            row[..., :sealed] = scores.view(tokens, groups, columns)[..., :sealed].mean(0)
        importance.index_copy_(0, request, row)

    def rank(
        self,
        index: int,
        layer: PagedLayer,
        settings: ArkValeConfig,
        requests: torch.Tensor,
        lane_pages: torch.Tensor,
        page_counts: torch.Tensor,
        query: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Scores of the select op for one step: ``[lane rows, pages]`` float32.

        Args:
            requests: ``[rows]`` int64 in the engine's slot table; the other arguments are those
                of ``score_pages``.
        """
        lane_rows, pages = lane_pages.shape
        if settings.selection == "streaming":
            latest = torch.arange(pages, dtype=torch.float32, device=query.device)
            return latest.expand(lane_rows, pages).contiguous()
        importance = self._importance[index]
        held = importance.index_select(0, requests)
        known = held[..., :pages].reshape(lane_rows, pages)
        if settings.selection == "snapkv":
            return known.contiguous()
        rule = selection_rule(settings)
        mass = score_pages(
            query,
            layer.digests,
            layer.residency.frame_of,
            lane_pages,
            page_counts,
            rule,
            head_reduce="softmax-mean",
            scaling=scaling,
        )
        competing = rule.competing(page_counts, pages)
        total = torch.where(known == math.inf, mass, known + mass)
        total = torch.where(competing, total, -math.inf)
        kept = total.topk(min(rule.must, pages), dim=1).indices
        lost = competing.scatter(1, kept, False)
        total = total.masked_fill(lost, -math.inf)
        held[..., :pages] = torch.where(competing, total, known).view(-1, held.shape[1], pages)
        importance.index_copy_(0, requests, held)
        return total
