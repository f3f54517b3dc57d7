"""Select op: which pages a row attends to in this step."""

from arkvale_kernels.select.api import Selection, select_pages

__all__ = ["Selection", "select_pages"]
