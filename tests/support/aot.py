"""Compile Triton kernels for GPUs that are not there, by running their launchers.

Inside :func:`compiling_for` a launch compiles the kernel exactly as that launch would, for the
chosen architecture, and starts nothing; what was compiled is kept for inspection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One cubin and what its assembler recorded."""

    name: str
    ptx: str
    cubin: bytes
    warps: int
    shared: int
    """Bytes of shared memory per program."""

    @functools.cached_property
    def usage(self) -> dict[str, int]:
        """``REG`` per thread, ``STACK`` and ``LOCAL`` bytes (spills), read from the cubin."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            text = subprocess.run(
                [_TOOLS / "cuobjdump", "-res-usage", file.name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)
        assert found, text
        return {key: int(value) for key, value in found}

    def global_accesses(self, kind: str) -> list[int]:
        """Bytes of every global ``ld``, ``st`` or ``cp.async`` in the PTX, in order."""
        if kind == "cp.async":
            sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)", self.ptx)
            return [int(size, 0) for size in sizes]
        pattern = rf"\b{kind}\.(?:\w+\.)*?global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\b"
        return [int(v or 1) * int(bits) // 8 for v, bits in re.findall(pattern, self.ptx)]


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int):
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(capability: int) -> Iterator[list[Compiled]]:
    """Turn launches into compilations for ``sm_<capability>``; yields what was compiled."""
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        asm, meta = kernel.asm, kernel.metadata
        compiled.append(
            Compiled(self.fn.__name__, asm["ptx"], asm["cubin"], meta.num_warps, meta.shared)
        )
        return kernel

    before = driver._active
    driver.set_active(_Driver(capability))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = before
