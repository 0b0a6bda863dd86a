"""A bank of embeddings, one a training sample, and negatives drawn from the labels on the device; what processes share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, distributed, nn

from distillzoo.adapters.connectors import unit_rows
from distillzoo.errors import OptionError
from distillzoo.kinds import is_whole
from distillzoo.streams import Stream

__all__ = ["EmbeddingBank", "NegativeSampler", "gather_ranks", "rank_positions"]

_PRODUCT_RATIO = 32  # rows of the bank per score up to which one product with all of it beats gathering rows (measured: 18x at 3)
_CHUNK = 1 << 24  # elements of a temporary: 64 MiB in float32
_CHUNK_CPU = 1 << 16  # draws at a time on a CPU, where their temporaries then stay in the cache (a third faster)
_STRIDE = 2_654_435_761  # a prime above any number of samples: k -> k * stride mod n visits every position once
_MOST_SAMPLES = 1 << 31  # what one 32-bit draw can choose from


class NegativeSampler(nn.Module):
    """Draw samples of other classes, on the device, from a label and an index alone.

    The training set's positions are sorted by class and written down twice; the negatives of a class are the positions that
    follow its own block, up to the block again, so that one uniform draw and an offset give a uniform negative. Draws are
    with replacement. Where a class has no more negatives than ``count``, ``count`` falls to the smallest number that any class
    has, and draws are without replacement (all of them, where classes are of one size). A draw is a pure function of stream,
    step and the anchor's own index, so that it depends on neither batch nor order nor the number of processes.

    Args:
        targets: ``(N,)`` labels of the training set.
        num_classes: Number of classes.
        count: Negatives that are wanted for every anchor, at least 1.

    Attributes:
        requested: Negatives that were wanted.
        count: Negatives that are drawn.

    Raises:
        OptionError: If ``count`` is below 1, a label is out of range, or there is but one class.
    Example:
        >>> sampler = NegativeSampler(torch.tensor([0, 1, 0, 2]), num_classes=3, count=2)
        >>> stream = Stream.named(0, "negatives")
        >>> sorted(sampler.draw(stream, 0, labels=torch.tensor([0]), index=torch.tensor([2]))[0].tolist())
        [1, 3]
    """

    order: Tensor
    starts: Tensor
    sizes: Tensor

    def __init__(self, targets: Tensor, *, num_classes: int, count: int) -> None:
        super().__init__()
        targets = targets.detach().to(torch.int64).cpu()
        if not is_whole(count, 1):
            raise OptionError(f"The number of negatives must be an integer of at least 1; got {count!r}; pass one, such as 16384.")
        if not 0 < len(targets) < _MOST_SAMPLES or int(targets.min()) < 0 or int(targets.max()) >= num_classes:
            found = f" from {int(targets.min())} to {int(targets.max())}" if len(targets) else ""
            raise OptionError(
                f"targets must be 1 to 2**31 - 1 labels from 0 to {num_classes - 1}; got {len(targets)}{found}; "
                "pass the training set's own labels."
            )
        sizes = torch.bincount(targets, minlength=num_classes)
        fewest = len(targets) - int(sizes.max())
        if fewest == 0:
            raise OptionError(
                f"Negatives are samples of another class, and all {len(targets)} targets are of class {int(targets[0])}; "
                "pass the labels of the whole training set."
            )
        order = torch.argsort(targets, stable=True)
        self.requested = count
        self.count = min(count, fewest)
        self._distinct = count >= fewest
        # derived from the labels, so not part of the state
        self.register_buffer("order", torch.cat([order, order]), persistent=False)
        self.register_buffer("starts", torch.cumsum(sizes, 0) - sizes, persistent=False)
        self.register_buffer("sizes", sizes, persistent=False)

    def draw(self, stream: Stream, step: int | Tensor, *, labels: Tensor, index: Tensor) -> Tensor:
        """Draw negatives for a batch.

        Args:
            stream: Stream of the draws.
            step: Step of the stream; a 0-dim tensor is not copied to the host.
            labels: ``(B,)`` classes of the anchors.
            index: ``(B,)`` positions of the anchors in the training set: which draws are theirs.
        Returns:
            ``(B, count)`` int64 positions in the training set.
        """
        drawn = torch.empty((len(labels), self.count), dtype=torch.int64, device=labels.device)
        rows = max(_CHUNK_CPU // self.count, 1) if labels.device.type == "cpu" else len(labels)
        sizes = self.sizes[labels].unsqueeze(1)
        others, after = len(self.order) // 2 - sizes, self.starts[labels].unsqueeze(1) + sizes
        numbers = torch.arange(self.count, device=labels.device)
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            own = index[part].unsqueeze(1)
            if self._distinct:
                chosen = (stream.integers(step, own, others[part]) + numbers * _STRIDE) % others[part]
            else:
                chosen = stream.integers(step, own * self.count + numbers, others[part])
            chosen += after[part]
            drawn[part] = self.order.index_select(0, chosen.flatten()).view_as(chosen)
        return drawn

    def draw_same_class(self, stream: Stream, step: int | Tensor, *, labels: Tensor, index: Tensor) -> Tensor:
        """Draw one position of each anchor's own class, the anchor's among them; ``(B,)``."""
        return self.order[self.starts[labels] + stream.integers(step, index, self.sizes[labels])]


class EmbeddingBank(nn.Module):
    """One embedding a training sample, moved towards what the network says each time the sample comes by.

    Part of the state, so that training resumes as if it had not stopped. Starts uniform on +-1 / sqrt(dim / 3), rows of
    length 1 in the mean.

    Args:
        num_samples: Size of the training set.
        dim: Width of an embedding.
    """

    memory: Tensor

    def __init__(self, num_samples: int, dim: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(dim / 3.0)
        self.register_buffer("memory", torch.empty(num_samples, dim).uniform_(-bound, bound))

    def scores(self, anchors: Tensor, index: Tensor) -> Tensor:
        """Multiply every anchor with its own choice of rows.

        Args:
            anchors: ``(B, dim)``; gradients flow into it, none into the bank.
            index: ``(B, M)`` int64 rows of the bank.
        Returns:
            ``(B, M)`` inner products.
        """
        memory = self.memory.to(anchors.dtype)
        if len(memory) > _PRODUCT_RATIO * index.shape[1]:
            gathered: Tensor = _GatheredProduct.apply(anchors, memory, index)
            return gathered
        rows = max(_CHUNK // len(memory), 1)
        parts = [
            (part @ memory.t()).gather(1, own)
            for part, own in zip(torch.split(anchors, rows), torch.split(index, rows), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Tensor, momentum: float) -> None:
        """Set the rows ``index`` to unit(momentum * row + (1 - momentum) * embedding); of a repeated index the last one counts.

        Args:
            index: ``(B,)`` int64 rows.
            embeddings: ``(B, dim)``.
            momentum: Share of the row that stays.
        """
        numbers = torch.arange(len(index), device=index.device)
        last = torch.where(index.unsqueeze(0) == index.unsqueeze(1), numbers, -1).amax(1)
        moved = momentum * self.memory[index] + (1.0 - momentum) * embeddings[last].to(self.memory.dtype)
        self.memory.index_copy_(0, index, unit_rows(moved))  # repeated rows are equal, so their order is nobody's concern


class _GatheredProduct(torch.autograd.Function):
    """Scores of gathered rows for banks too large for a product with all of it; the backward gathers again instead of storing."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, memory: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(memory, index)
        rows = _rows_at_once(memory, index)
        pairs = zip(torch.split(anchors, rows), torch.split(index, rows), strict=True)
        return torch.cat([torch.einsum("bmd,bd->bm", memory[own], part) for part, own in pairs])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        memory, index = ctx.saved_tensors
        rows = _rows_at_once(memory, index)
        pairs = zip(torch.split(grad, rows), torch.split(index, rows), strict=True)
        return torch.cat([torch.einsum("bmd,bm->bd", memory[own], part) for part, own in pairs]), None, None


def _rows_at_once(memory: Tensor, index: Tensor) -> int:
    return max(_CHUNK // (index.shape[1] * memory.shape[1]), 1)


def gather_ranks(tensor: Tensor) -> Tensor:
    """Concatenate a tensor of all processes of a distributed run, without gradients; elsewhere the tensor itself.

    Args:
        tensor: ``(B, ...)``, of the same shape in every process.
    """
    if not _several_ranks():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def rank_positions(count: int, device: torch.device) -> Tensor:
    """Number what this process draws, ``(count,)`` from 0; in a distributed run after what the processes before it draw.

    So no two of them draw the same, and all together draw what one process would for their batches side by side.

    Args:
        count: Number of draws, the same in every process.
        device: Where to.
    """
    first = count * distributed.get_rank() if _several_ranks() else 0
    return torch.arange(first, first + count, device=device)


def _several_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
