"""Kernels run in Triton's interpreter here; servers and scripts that tests start do not.

Triton decides when it is imported, and for each kernel when that is defined, so both happen here
under the variable, which then goes, lest it reach child processes.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
import triton.experimental.gluon  # noqa: F401  a launch would import it, too late

from arkvale_kernels.attend import kernel as _attend  # noqa: F401
from arkvale_kernels.digest import kernel as _digest  # noqa: F401
from arkvale_kernels.residency import kernel as _residency  # noqa: F401
from arkvale_kernels.score import kernel as _score  # noqa: F401
from arkvale_kernels.select import kernel as _select  # noqa: F401
from arkvale_kernels.transfer import kernel as _transfer  # noqa: F401

del os.environ["TRITON_INTERPRET"]


# -- bfloat16 in the interpreter -------------------------------------------------------------
# It keeps bfloat16 as bits in uint16.  Its dot multiplies them as integers, and rounding to it
# cuts off; both are put right here, so that kernels compute as on a device.

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_dot, _cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl


def _widened(handle):
    """The same values as float32, where they are bfloat16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = torch.tensor(handle.data.view("int16"))
    return TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)


def _dot_of_values(self, a, b, *rest):
    return _dot(self, _widened(a), _widened(b), *rest)


def _rounding_cast(self, source, to):
    if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
        return _cast(self, _widened(source), to)
    rounded = torch.tensor(source.data).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.int16).numpy().view("uint16"), tl.bfloat16)


InterpreterBuilder.create_dot = _dot_of_values
InterpreterBuilder.cast_impl = _rounding_cast
