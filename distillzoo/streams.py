"""Every random draw of the project: counter-based, pure functions of (seed, stream, step, index).

A draw has no state. Whoever asks for the same (seed, stream name, step, index) gets the same number on any device, in any
order, in any process: so views replay, members of a group do not disturb each other, resume needs no generator files, and
a CUDA graph can capture the draw. Everything is torch integer arithmetic on the device of ``index``.

The hash is two rounds of a 32-bit finaliser with full avalanche (multiplier constants 0x7feb352d and 0x846ca68b, found by
C. Wellons, "Prospecting for Hash Functions", 2018) over the index, keyed by 64 bits that splitmix64 (Steele, Lea, Flood,
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) derives from seed, stream and step.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from distillzoo.errors import OptionError

__all__ = ["Stream", "draw_seed", "forked_generator"]

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int, bits: int) -> int:
    """Return ``value`` modulo ``2**bits`` as the signed integer with the same bits (torch has no unsigned arithmetic)."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


_SPLIT_A, _SPLIT_B, _GOLDEN_SIGNED = (_signed(c, 64) for c in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, _GOLDEN))
_GOLDEN_32 = _signed(_GOLDEN, 32)
_MIX_A, _MIX_B = _signed(0x7FEB352D, 32), _signed(0x846CA68B, 32)


def _shift(x: Tensor, places: int, bits: int) -> Tensor:
    """Logical right shift of a signed tensor."""
    return (x >> places) & ((1 << (bits - places)) - 1)


def _split64(x: Tensor) -> Tensor:
    """splitmix64's output function on int64."""
    x = (x ^ _shift(x, 30, 64)) * _SPLIT_A
    x = (x ^ _shift(x, 27, 64)) * _SPLIT_B
    return x ^ _shift(x, 31, 64)


def _mix32(x: Tensor) -> Tensor:
    """32-bit finaliser on int32."""
    x = (x ^ _shift(x, 16, 32)) * _MIX_A
    x = (x ^ _shift(x, 15, 32)) * _MIX_B
    return x ^ _shift(x, 16, 32)


def _low32(x: Tensor) -> Tensor:
    """The low 32 bits of an int64 tensor as int32 (the same bits, signed)."""
    return (((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)


@dataclass(frozen=True)
class Stream:
    """A named sequence of draws.

    Args:
        root: 64-bit key; make streams with :meth:`named`.
    """

    root: int

    @classmethod
    def named(cls, seed: int, *names: str | int) -> Stream:
        """Make the stream of a seed and a name (several parts give a path).

        Example:
            >>> Stream.named(0, "views", "crop") == Stream.named(0, "views", "crop")
            True
            >>> Stream.named(0, "views") == Stream.named(1, "views")
            False
        """
        text = "/".join([str(int(seed)), *map(str, names)])
        return cls(_signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"), 64))

    def bits(self, step: int | Tensor, index: Tensor) -> Tensor:
        """Draw 32 bits for every element of ``index``.

        Args:
            step: Step or epoch; a number or a 0-dim int64 tensor (which is never copied to the host).
            index: Integer tensor of any shape, values from 0 to 2**63 - 1: which draw of the step.
        Returns:
            int64 tensor of the shape of ``index`` with values from 0 to 2**32 - 1.
        """
        low, high = self._key(step, index.device)
        index = index.to(torch.int64)
        mixed = _mix32(index.to(torch.int32) * _GOLDEN_32 ^ low)  # the casts keep the low 32 bits
        mixed = _mix32(mixed ^ (index >> 32).to(torch.int32) ^ high)
        return mixed.to(torch.int64) & 0xFFFFFFFF

    def integers(self, step: int | Tensor, index: Tensor, high: int | Tensor) -> Tensor:
        """Draw int64 values uniform on ``0 .. high - 1`` (``high`` at most 2**31, a number or a tensor that broadcasts)."""
        return (self.bits(step, index) * high) >> 32

    def uniform(self, step: int | Tensor, index: Tensor) -> Tensor:
        """Draw float32 values uniform on [0, 1), with 24 bits."""
        return (self.bits(step, index) >> 8).to(torch.float32) * (1.0 / (1 << 24))

    def normal(self, step: int | Tensor, index: Tensor) -> Tensor:
        """Draw float32 standard normal values (Box-Muller on two draws)."""
        radius = (1.0 - self.uniform(step, 2 * index)).log().mul(-2.0).sqrt()
        return radius * torch.cos((2.0 * math.pi) * self.uniform(step, 2 * index + 1))

    def permutation(self, step: int | Tensor, size: int, device: torch.device | None = None) -> Tensor:
        """Draw a permutation of ``0 .. size - 1`` as an int64 tensor (a stable sort of 62-bit keys)."""
        index = torch.arange(size, device=device)
        keys = (self.bits(step, 2 * index) << 30) ^ (self.bits(step, 2 * index + 1) >> 2)
        return torch.argsort(keys, stable=True)

    def seed(self, step: int = 0) -> int:
        """Return a non-negative 63-bit seed for a generator that is not ours (a network's own dropout)."""
        x = (self.root + (step + 1) * _GOLDEN) & _MASK64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
        return (x ^ (x >> 31)) >> 1

    def _key(self, step: int | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        counter = (
            step.to(device=device, dtype=torch.int64)
            if isinstance(step, Tensor)
            else torch.full((), step, dtype=torch.int64, device=device)
        )
        key = _split64((counter + 1) * _GOLDEN_SIGNED + self.root)
        return _low32(key), _low32(key >> 32)


def draw_seed(seed: int | None) -> int:
    """Return ``seed``, or one drawn from torch's global generator when it is ``None``.

    Raises:
        OptionError: If the seed is negative or not an integer.
    """
    if seed is None:
        return int(torch.randint(0, 1 << 62, ()).item())
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or (number := operator.index(seed)) < 0:
        raise OptionError(f"seed must be a non-negative integer or None; got {seed!r}.")
    return number


@contextmanager
def forked_generator(stream: Stream, step: int = 0, *, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run the block with torch's generators seeded from the stream, and put them back as they were.

    For code that draws from torch's own generators: initialisers, dropout, drop-path.

    Args:
        stream: The stream whose seed is used.
        step: Step of the stream.
        device: Device whose generator is forked beside the CPU's.
    """
    device = torch.device(device)
    cuda = [device.index if device.index is not None else torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        seed = stream.seed(step)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach devices that are not put back
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
