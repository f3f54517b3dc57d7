"""Make the registry's torchvision importable beside a CPU build of torch.

    python patches/torchvision_cpu.py apply | verify | revert

transformers insists on an importable torchvision.  Without CUDA its compiled operators do not
load, and the import then fails because the schemas of two of them are unknown.  The patch defines
the two schemas (nothing calls them); it touches one file, knows exactly which contents it may
touch, and changes nothing where torchvision imports already.

``apply`` and ``revert`` may be repeated.  ``verify`` says which state the file is in.  Exit
status: 0 done or healthy, 1 not patched but needed, 2 a torchvision this patch does not know.
Dies when torchvision publishes CPU wheels on the package registry.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

KNOWN = {"0.28.0": "775cb7a87f9b26eb9fcb498f79313560a4878968d458acaf95b9b5ae6b4656d3"}
"""SHA-256 of torchvision/__init__.py as shipped, by version."""

ANCHOR = "from . import extension  # usort:skip  # noqa: F401\n"
ADDED = """\
if not extension._has_ops():  # added by arkvale-sglang: patches/torchvision_cpu.py
    _schemas = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _schemas.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


class UnknownTorchvision(Exception):
    """The installed torchvision is not one this patch was written against."""


def locate() -> Path:
    """Path of the file to patch, after checking that the version is known."""
    try:
        distribution = importlib.metadata.distribution("torchvision")
    except importlib.metadata.PackageNotFoundError:
        raise UnknownTorchvision("torchvision is not installed; install it first") from None
    version = distribution.version.partition("+")[0]
    if version not in KNOWN:
        raise UnknownTorchvision(
            f"torchvision {distribution.version} is unknown to this patch, which was written for "
            f"{', '.join(KNOWN)}; install one of these"
        )
    return Path(str(distribution.locate_file("torchvision/__init__.py")))


def is_patched(path: Path) -> bool:
    """Whether the file carries the patch; raises if it is neither patched nor as shipped."""
    text = path.read_text()
    original = text.replace(ANCHOR + ADDED, ANCHOR)
    if hashlib.sha256(original.encode()).hexdigest() not in KNOWN.values():
        raise UnknownTorchvision(f"{path} was changed by someone else; reinstall torchvision")
    return original != text


def imports() -> bool:
    """Whether torchvision imports in a fresh interpreter."""
    return (
        subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode
        == 0
    )


def apply(path: Path) -> int:
    if is_patched(path):
        print("torchvision: already patched")
    elif imports():
        print("torchvision: imports as it is, nothing to patch")
    else:
        path.write_text(path.read_text().replace(ANCHOR, ANCHOR + ADDED))
        print(f"torchvision: patched {path}")
    return verify(path)


def revert(path: Path) -> int:
    if is_patched(path):
        path.write_text(path.read_text().replace(ANCHOR + ADDED, ANCHOR))
        print(f"torchvision: reverted {path}")
    else:
        print("torchvision: not patched")
    return 0


def verify(path: Path) -> int:
    state = "patched" if is_patched(path) else "as shipped"
    healthy = imports()
    print(f"torchvision: {state}, {'imports' if healthy else 'does not import'}")
    return 0 if healthy else 1


def main(arguments: list[str]) -> int:
    commands = {"apply": apply, "verify": verify, "revert": revert}
    if len(arguments) != 1 or arguments[0] not in commands:
        print(f"usage: torchvision_cpu.py {' | '.join(commands)}", file=sys.stderr)
        return 2
    try:
        return commands[arguments[0]](locate())
    except UnknownTorchvision as error:
        print(f"error: {error}.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
