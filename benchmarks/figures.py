"""Plots of results: each carries a fingerprint of the data that it shows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def save(figure: Figure, path: Path, data: Any) -> None:
    """Write the figure as PNG, with the fingerprint of ``data`` in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None, "Source": fingerprint(data)})
    plt.close(figure)


def fingerprint(data: Any) -> str:
    """Of anything that JSON takes."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()
