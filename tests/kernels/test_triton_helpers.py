"""8-bit floats made and read by integer arithmetic, against torch's own."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from arkvale_kernels.triton_helpers import decode_fp8, encode_fp8, multiprocessors, ordered_bits
from support.numeric import normal

FP8 = torch.float8_e4m3fn
BLOCK = 4096


def _encode(source, target, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + place, mask=place < count, other=0.0)
    tl.store(target + place, encode_fp8(value), mask=place < count)


def _decode(source, target, count, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    byte = tl.load(source + place, mask=place < count, other=0)
    tl.store(target + place, decode_fp8(byte), mask=place < count)


def _order(source, target, count, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    score = tl.load(source + place, mask=place < count, other=0.0)
    tl.store(target + place, ordered_bits(score), mask=place < count)


def run(kernel, source: torch.Tensor, dtype: torch.dtype, guards) -> torch.Tensor:
    target = guards.empty(source.shape[0], dtype=dtype)
    source = guards.hold(source, frozen=True)
    grid = (triton.cdiv(source.shape[0], BLOCK),)
    InterpretedFunction(kernel)[grid](source, target, source.shape[0], BLOCK=BLOCK)
    return target


def assert_encoded_as_by_torch(values: torch.Tensor, guards) -> None:
    """Torch would turn into NaN what saturates here, and knows a negative zero."""
    encoded = run(_encode, values, torch.uint8, guards).view(FP8)
    assert torch.equal(encoded.float(), values.clamp(-448, 448).to(FP8).float())


def test_every_byte_decodes_exactly(guards):
    """The two NaNs are the exception: digests saturate instead, so neither is ever stored."""
    every = torch.arange(256, dtype=torch.uint8)
    numbers = every[(every & 0x7F) != 0x7F]
    decoded = run(_decode, numbers, torch.float32, guards)
    assert torch.equal(decoded, numbers.view(FP8).float())


def test_every_8_bit_float_encodes_to_itself(guards):
    every = torch.arange(256, dtype=torch.uint8)
    numbers = every[(every & 0x7F) != 0x7F]
    encoded = run(_encode, numbers.view(FP8).float(), torch.uint8, guards)
    assert torch.equal(encoded[numbers != 0x80], numbers[numbers != 0x80])
    assert encoded[numbers == 0x80] & 0x7F == 0, "a zero of either sign"


def test_ties_and_their_neighbours_round_as_torch_rounds(guards):
    """Half-way between any two numbers, and one float32 to either side, of both signs."""
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    near = [ties, *(ties.nextafter(torch.tensor(end)) for end in (0.0, torch.inf))]
    values = torch.cat(near)
    values = torch.cat((values, -values))
    assert_encoded_as_by_torch(values, guards)


def test_values_beyond_the_range_saturate(guards):
    values = torch.tensor([448.0, 449, 463.9, 464, 464.1, 480, 1e9, 3e38, torch.inf])
    values = torch.cat((values, -values))
    encoded = run(_encode, values, torch.uint8, guards).view(FP8).float()
    assert torch.equal(encoded, values.sign() * 448)


@pytest.mark.parametrize("seed", range(2))
def test_any_float_rounds_as_torch_rounds(seed, guards):
    """Random bits of every exponent, float32 subnormals included, and common magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator).int()
    anything = bits.view(torch.float32)
    scales = torch.tensor([2e-3, 1e-2, 0.1, 1.0, 30.0, 300.0]).repeat_interleave(2000)
    values = torch.cat((anything[~anything.isnan()], normal(12000, seed=seed) * scales))
    values = torch.cat((values, torch.tensor([0.0, -0.0, 1e-45, -1e-45])))
    assert_encoded_as_by_torch(values, guards)


def test_ordered_bits_rise_with_the_score(guards):
    rising = torch.tensor([-torch.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3e38, torch.inf])
    ordered = run(_order, rising, torch.int64, guards)
    assert (ordered.diff() > 0).all() and ordered.min() >= 0 and ordered.max() < 2**32


def test_a_machine_without_a_device_counts_as_an_h100():
    assert multiprocessors(torch.device("cpu")) == 132
