"""The fast number format of a device: bfloat16 where its processor computes with it, else float32.

A CPU without bfloat16 units (AVX2, most laptops) emulates it and takes about ten times as long as for float32, so the
choice is made by a measurement of both.
"""

import time
from typing import NamedTuple

import torch


SIZE = 256  # of the matrices whose product is timed
ROUNDS = 6  # the first only warms up
WORTHWHILE = 0.8  # largest share of float32's time at which bfloat16 still pays for its casts and rounding


class Choice(NamedTuple):
    """A number format and the reason for it."""

    dtype: torch.dtype
    reason: str


def fastest_dtype(device: torch.device) -> Choice:
    """Chooses between bfloat16 and float32 for matrix products on a device."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice(torch.bfloat16, "this GPU computes in bfloat16")
        return Choice(torch.float32, "this GPU does not compute in bfloat16")
    if device.type != "cpu":
        return Choice(torch.float32, f"bfloat16 on {device.type} was never tried here")
    ratio = bfloat16_time_ratio()
    reason = f"a product of matrices in bfloat16 takes {ratio:.2g} times as long as in float32 here"
    return Choice(torch.bfloat16 if ratio <= WORTHWHILE else torch.float32, reason)


def bfloat16_time_ratio() -> float:
    """Time of a product of matrices on the CPU in bfloat16 over its time in float32, with the present threads."""
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay untouched
    left, right = torch.randn(2, SIZE, SIZE, generator=generator)
    seconds: dict[torch.dtype, list[float]] = {torch.bfloat16: [], torch.float32: []}
    for _ in range(ROUNDS):
        for dtype, times in seconds.items():
            factors = left.to(dtype), right.to(dtype)
            start = time.perf_counter()
            torch.mm(*factors)
            times.append(time.perf_counter() - start)
    return min(seconds[torch.bfloat16][1:]) / min(seconds[torch.float32][1:])
