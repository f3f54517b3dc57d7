"""``arkvale doctor`` finds what keeps the policy from running, and nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import resource
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from arkvale_sglang.cli import doctor
from arkvale_sglang.cli import main as command
from arkvale_sglang.integration import compat
from arkvale_sglang.integration import doctor as engine

ROOT = Path(__file__).resolve().parents[2]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without GPU says")


@pytest.fixture
def ask(monkeypatch, capsys):
    """Run the command as it is typed: exit status, findings by name, sentence of a failure."""
    monkeypatch.setattr(sys, "argv", ["arkvale", "doctor", "--json"])
    for variable in ("SGLANG_PLUGINS", "SGLANG_PLATFORM"):
        monkeypatch.delenv(variable, raising=False)

    def run() -> tuple[int, dict[str, dict], str]:
        code = command.main()
        out, error = capsys.readouterr()
        answer = json.loads(out)
        assert answer["can_run"] == (code == 0)
        return code, {check["name"]: check for check in answer["checks"]}, error

    return run


def problems(checks: dict[str, dict]) -> list[str]:
    return [name for name, check in checks.items() if check["status"] == "problem"]


def assert_unfit(code: int, checks: dict[str, dict], error: str, *names: str) -> None:
    assert code == 1 and problems(checks) == list(names)
    assert error.startswith("error: the policy cannot run here; ")
    for name in names:
        assert checks[name]["remedy"].endswith("."), "it says what to do"


def hooks(checks: dict[str, dict]) -> list[str]:
    return [name for name, check in checks.items() if check["section"].startswith("hook points")]


def test_a_healthy_machine_can_run_and_every_hook_point_is_listed(ask):
    code, checks, error = ask()
    assert (code, problems(checks), error) == (0, [], "")
    assert checks["sglang"]["found"] == compat.version()
    points = compat.hook_points()
    assert points == {n: v for n, v in vars(compat).items() if isinstance(v, compat.HookPoint)}
    assert len(points) >= 20
    assert hooks(checks) == [
        f"{point.target.removeprefix('sglang.srt.')}({', '.join(point.parameters)})"
        + (", optional" if point.optional else "")
        for point in points.values()
    ]


def test_a_hook_point_that_is_gone_or_changed_is_a_problem(ask, monkeypatch):
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.schedule_policy import PrefillAdder

    monkeypatch.delattr(PrefillAdder, "add_one_req")
    monkeypatch.setattr(ScheduleBatch, "check_decode_mem", lambda self, buffers: None)
    code, checks, error = ask()
    names = (
        "managers.schedule_policy.PrefillAdder.add_one_req(req)",
        "managers.schedule_batch.ScheduleBatch.check_decode_mem(selected_indices)",
    )
    assert_unfit(code, checks, error, *names)
    gone, changed = (checks[name]["found"] for name in names)
    assert gone.endswith("PrefillAdder.add_one_req does not exist")
    assert changed.endswith("check_decode_mem has no parameter 'selected_indices'")


def test_an_optional_hook_point_may_be_absent(ask, monkeypatch):
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    monkeypatch.delattr(KVCacheConfigurator, "_build_oot_mha_kv_pool", raising=False)
    code, checks, _ = ask()
    (optional,) = (check for name, check in checks.items() if name.endswith(", optional"))
    assert code == 0 and optional["found"].startswith("absent in this release")


def test_a_module_that_breaks_while_it_is_imported_is_told(monkeypatch):
    def broken(name):
        raise RuntimeError("no driver")

    monkeypatch.setattr(compat.pkgutil, "resolve_name", broken)
    reason = compat.problem(compat.BUILD_PLATFORM_POOL)
    assert reason.endswith("cannot be imported (RuntimeError: no driver)")


def test_without_sglang_it_says_so_and_looks_at_the_rest(ask, monkeypatch):
    def missing():
        raise importlib.metadata.PackageNotFoundError("sglang")

    monkeypatch.setattr(compat, "version", missing)
    code, checks, error = ask()
    assert_unfit(code, checks, error, "sglang")
    assert checks["sglang"]["found"] == "not installed"
    assert "pip install sglang==" in checks["sglang"]["remedy"]
    assert hooks(checks) == [] and "host memory" in checks


def test_an_sglang_that_does_not_import_is_told_with_its_error(ask, monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.scheduler", None)
    code, checks, error = ask()
    assert_unfit(code, checks, error, "sglang")
    found = checks["sglang"]["found"]
    assert "which cannot be imported (ModuleNotFoundError: " in found and "\n" not in found


def test_a_release_that_no_test_runs_on_is_worth_a_note(ask, monkeypatch):
    monkeypatch.setattr(compat, "version", lambda: "0.5.99")
    code, checks, _ = ask()
    assert code == 0 and checks["sglang"]["status"] == "note"


def test_it_knows_the_entry_points_that_the_package_registers():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {
        group: next(iter(points.items())) for group, points in project["entry-points"].items()
    }
    assert listed == engine.ENTRY_POINTS


@on_cpu
@pytest.mark.parametrize(
    ("variable", "value", "kept_out"),
    [
        ("SGLANG_PLUGINS", "others", [0, 1]),
        ("SGLANG_PLUGINS", "others, arkvale_cpu", [0]),
        ("SGLANG_PLATFORM", "others", [0, 1]),
        ("SGLANG_PLUGINS", "arkvale,arkvale_cpu", []),
        ("SGLANG_PLATFORM", "arkvale_cpu", []),
    ],
)
def test_variables_that_keep_the_plugins_out(ask, monkeypatch, variable, value, kept_out):
    monkeypatch.setenv(variable, value)
    code, checks, error = ask()
    names = ["arkvale in sglang.srt.plugins", "arkvale_cpu in sglang.srt.platforms"]
    if kept_out:
        assert_unfit(code, checks, error, *(names[index] for index in kept_out))
        assert all(variable in checks[names[index]]["found"] for index in kept_out)
    else:
        assert code == 0 and problems(checks) == []


def test_a_package_that_is_not_installed_is_a_problem(ask, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    code, checks, _ = ask()
    assert code == 1 and "pip install ." in checks["arkvale in sglang.srt.plugins"]["remedy"]


def test_a_torchvision_that_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    check = doctor.torchvision()
    assert check.status == "problem" and "torchvision_cpu.py apply" in check.remedy


@pytest.mark.parametrize(
    ("text", "state"),
    [("", "as it is shipped"), ("# added: patches/torchvision_cpu.py", "patched for a CPU")],
)
def test_the_state_of_torchvision(monkeypatch, tmp_path, text, state):
    module = ModuleType("torchvision")
    module.__version__, module.__file__ = "0.28.0", str(tmp_path / "__init__.py")
    Path(module.__file__).write_text(text)
    monkeypatch.setitem(sys.modules, "torchvision", module)
    assert doctor.torchvision().found == f"0.28.0, {state}"


@pytest.mark.parametrize(("capability", "status"), [((9, 0), "ok"), ((7, 5), "note")])
def test_gpus_are_described(monkeypatch, capability, status):
    major, minor = capability
    known = SimpleNamespace(name="A GPU", total_memory=80 << 30, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: known)
    monkeypatch.setattr(doctor, "_driver", lambda: "580.1")
    checks = doctor.gpus()
    assert [check.name for check in checks] == ["GPU 0", "GPU 1"]
    assert checks[0].status == status
    assert checks[0].found == (f"A GPU, 80.0 GiB, compute capability {major}.{minor}, driver 580.1")


@pytest.mark.parametrize(("driver", "status"), [(None, "ok"), ("580.1", "problem")])
def test_a_driver_whose_gpu_torch_does_not_see_is_a_problem(monkeypatch, driver, status):
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    assert doctor.no_gpu().status == status


@pytest.mark.parametrize(
    ("limit", "used", "room"), [("max", "1", None), (str(3 << 30), str(2 << 30), 1 << 30)]
)
def test_the_limit_of_a_control_group_counts(monkeypatch, tmp_path, limit, used, room):
    files = tmp_path / "max", tmp_path / "current"
    for file, text in zip(files, (limit, used), strict=True):
        file.write_text(f"{text}\n")
    monkeypatch.setattr(doctor, "CGROUP_FILES", (("/nowhere", "/nowhere"), files))
    memory = SimpleNamespace(available=16 << 30, total=32 << 30)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory)
    assert doctor._cgroup_room() == room
    group = next(c for c in doctor.host_memory(False) if c.name == "control group")
    if room is None:
        assert group.status == "ok"
    else:
        assert group.status == "note" and "--arkvale-host-memory below" in group.remedy


@pytest.mark.parametrize(
    ("limit", "on_gpu", "status"),
    [(resource.RLIM_INFINITY, True, "ok"), (8 << 20, True, "note"), (8 << 20, False, "ok")],
)
def test_a_limit_on_pinned_memory_matters_to_a_gpu(monkeypatch, limit, on_gpu, status):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda what: (limit, limit))
    check = doctor.host_memory(on_gpu)[-1]
    assert check.name == "locked memory" and check.status == status
    assert ("ulimit -l unlimited" in check.remedy) == (status == "note")


def test_shared_memory_that_is_absent_or_small(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path / "nowhere")
    assert doctor.shared_memory().status == "problem"
    usage = SimpleNamespace(total=64 << 20, used=0, free=64 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    small = doctor.shared_memory()
    assert small.status == "note" and "--shm-size" in small.remedy


def test_people_read_a_table_with_what_to_do_below_each_problem(monkeypatch, capsys):
    """In a process of its own, whose plugin is kept out."""
    script = [str(Path(sys.executable).parent / "arkvale"), "doctor"]
    monkeypatch.setenv("SGLANG_PLUGINS", "others")
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    at = lines.index("problem arkvale in sglang.srt.plugins: kept out by SGLANG_PLUGINS=others")
    assert lines[at + 1] == "-> Add arkvale to SGLANG_PLUGINS, or unset it."
    assert f"ok sglang: {compat.version()}" in lines
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the policy cannot run here; ")
