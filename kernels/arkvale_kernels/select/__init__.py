"""Select op: which pages a row attends to in this step."""

from arkvale_kernels.select.api import COUNTED, Selection, select_pages

__all__ = ["COUNTED", "Selection", "select_pages"]
