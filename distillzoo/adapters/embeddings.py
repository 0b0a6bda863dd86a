"""Embeddings of vectors on the unit sphere."""

from __future__ import annotations

from torch import Tensor, nn

from distillzoo.adapters.connectors import unit_rows

__all__ = ["UnitEmbedding"]


class UnitEmbedding(nn.Module):
    """A linear layer with bias, and its output divided by its norm.

    A row whose norm does not exceed 1e-12 becomes (nearly) zero instead of not-a-number, and hands no gradient on.

    Args:
        in_features: Width of the input.
        dim: Width of the embedding.
    Example:
        >>> import torch
        >>> lengths = UnitEmbedding(6, 4)(torch.ones(3, 6)).norm(dim=1)
        >>> torch.allclose(lengths, torch.ones(3))
        True
    """

    def __init__(self, in_features: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, dim)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map ``(B, in_features)`` to ``(B, dim)`` rows of length 1."""
        return unit_rows(self.linear(vectors))
