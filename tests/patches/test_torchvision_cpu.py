"""The torchvision patch on a copy of the package: applied, recognised, taken back, or refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def patch():
    spec = importlib.util.spec_from_file_location("patch", ROOT / "patches/torchvision_cpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shipped(patch, tmp_path) -> Path:
    """The file as the registry ships it, rebuilt from the installed one."""
    text = patch.locate().read_text()
    path = tmp_path / "__init__.py"
    path.write_text(text.replace(patch.ANCHOR + patch.ADDED, patch.ANCHOR))
    return path


def test_apply_and_revert_are_idempotent_and_exact(patch, shipped, monkeypatch):
    monkeypatch.setattr(patch, "imports", lambda: patch.is_patched(shipped))
    original = shipped.read_text()
    assert patch.verify(shipped) == 1
    assert patch.apply(shipped) == patch.apply(shipped) == 0
    assert patch.ADDED in shipped.read_text() and patch.verify(shipped) == 0
    assert patch.revert(shipped) == patch.revert(shipped) == 0
    assert shipped.read_text() == original


def test_a_torchvision_that_imports_is_left_alone(patch, shipped, monkeypatch):
    monkeypatch.setattr(patch, "imports", lambda: True)
    original = shipped.read_text()
    assert patch.apply(shipped) == 0
    assert shipped.read_text() == original


def test_a_changed_file_is_refused_and_left_alone(patch, shipped):
    changed = shipped.read_text() + "# mine\n"
    shipped.write_text(changed)
    for command in (patch.apply, patch.revert, patch.verify):
        with pytest.raises(patch.UnknownTorchvision, match="changed by someone else"):
            command(shipped)
    assert shipped.read_text() == changed


def test_an_unknown_version_is_refused_with_the_known_ones(patch, monkeypatch, capsys):
    monkeypatch.setattr(patch, "KNOWN", {"0.1.2": "0" * 64})
    assert patch.main(["apply"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "0.1.2" in message
    assert patch.main(["mend"]) == 2
