"""Score op: how much a query may attend to a page, read off the page's digest."""

from arkvale_kernels.score.api import HEAD_REDUCES, score_pages

__all__ = ["HEAD_REDUCES", "score_pages"]
