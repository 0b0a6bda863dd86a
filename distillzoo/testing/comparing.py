"""Named tensors before and after: what a step changed, and what it wrote into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from distillzoo.types import Batch, Trace

__all__ = ["Mark", "batch_tensors", "difference", "marked", "snapshot", "trace_tensors", "written"]

Mark = tuple[int, Tensor]
"""How often a tensor was written into, and a copy of its values."""


def snapshot(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copy named tensors."""
    return {name: tensor.detach().clone() for name, tensor in tensors}


def difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Return the names that are not in both or whose tensors are not equal bit for bit (NaN equals NaN)."""
    names = [*before, *(name for name in after if name not in before)]
    return [name for name in names if name not in before or name not in after or not _same(before[name], after[name])]


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or (
        torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())
    )


def marked(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Mark]:
    """Note of named tensors what :func:`written` compares."""
    return {name: (_version(tensor), tensor.detach().clone()) for name, tensor in tensors}


def written(before: Mapping[str, Mark], tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that were written into since, also where no value changed (a clamp, on this data).

    Values are compared too, since ``tensor.data`` writes without being counted.

    Args:
        before: What :func:`marked` returned.
        tensors: The same tensors now.
    """
    now = dict(tensors)
    changed = difference({name: values for name, (_, values) in before.items()}, now)
    return [name for name in {**before, **now} if name in changed or before[name][0] != _version(now[name])]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # inference tensors keep none


def trace_tensors(trace: Trace, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield a trace's logits and features by name, those of the second view as ``second.*``."""
    yield f"{prefix}logits", trace.logits
    for name, value in trace.features.items():
        yield f"{prefix}{name}", value
    if trace.second is not None:
        yield from trace_tensors(trace.second, f"{prefix}second.")


def batch_tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Yield what a batch holds by name."""
    for name in ("images", "targets", "index", "second_view"):
        value = getattr(batch, name)
        if value is not None:
            yield name, value
