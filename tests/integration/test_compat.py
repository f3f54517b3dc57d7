"""Every hook point of the installed SGLang is what the plugin thinks it is."""

from __future__ import annotations

import pytest

from arkvale_sglang.integration import compat


@pytest.mark.parametrize(
    "point", compat.hook_points().values(), ids=lambda point: point.target.rsplit(".", 1)[1]
)
def test_hook_point_resolves_with_its_parameters(point):
    assert compat.problem(point) is None


def test_a_hook_point_that_moved_is_named():
    gone = compat.HookPoint("sglang.srt.server_args.ServerArgs.gone")
    assert "gone does not exist" in compat.problem(gone)
    changed = compat.ADD_CLI_ARGS._replace(parameters=("parser", "mood"))
    assert "'mood'" in compat.problem(changed)
    assert compat.problem(gone._replace(optional=True)) is None


def test_a_missing_hook_ends_the_process_instead_of_running_stock_sglang(monkeypatch):
    from arkvale_sglang.integration import plugin

    gone = compat.HookPoint("sglang.srt.server_args.ServerArgs.gone")
    with pytest.raises(SystemExit, match=r"not supported because .*or see what `arkvale"):
        plugin._hook(gone, None, print)
    monkeypatch.setattr(plugin, "_hooked", [gone])
    with pytest.raises(SystemExit, match="did not apply the hook"):
        plugin._verify()
