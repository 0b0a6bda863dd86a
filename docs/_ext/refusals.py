"""The directive ``refusals``: which method refuses which kind of pair, and with what sentence, found by trying.

Small networks stand for the kinds; every registered method is built on each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from torch import Tensor, nn

from distillzoo import DataSpec, DistillZooError, build_distiller, create_model, list_distillers
from distillzoo.registry import DISTILLERS

CLASSES, SIZE = 10, 64
DATA = DataSpec(CLASSES, (SIZE, SIZE), targets=torch.arange(40) % CLASSES)
Teacher = nn.Module | list[nn.Module] | None


class Flat(nn.Module):
    """A perceptron on pixels: no maps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(B, CLASSES)``."""
        logits: Tensor = self.layers(images)
        return logits


class Bare(nn.Module):
    """A network whose classifier is a matrix and no module."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.matrix = nn.Parameter(torch.randn(16, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(B, CLASSES)``."""
        logits: Tensor = self.body(images).mean((2, 3)) @ self.matrix
        return logits


def convolutional() -> nn.Module:
    """Make a network of maps."""
    return create_model("resnet8", num_classes=CLASSES)


def tokens() -> nn.Module:
    """Make a network of tokens."""
    return create_model("timm/deit_tiny_patch16_224", num_classes=CLASSES, img_size=SIZE, depth=4, embed_dim=24)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Teacher], DataSpec]] = {
    "a transformer teaches a convolutional network": (convolutional, tokens, DATA),
    "a convolutional network teaches a transformer": (tokens, convolutional, DATA),
    "several teachers as one": (convolutional, lambda: [convolutional(), convolutional()], DATA),
    "a student without maps": (Flat, convolutional, DATA),
    "a teacher without maps": (convolutional, Flat, DATA),
    "a classifier that is no module": (convolutional, Bare, DATA),
    "no teacher": (convolutional, lambda: None, DATA),
    "the labels of the training set are not given": (convolutional, convolutional, replace(DATA, targets=None, num_samples=None)),
}


def refusals() -> list[tuple[str, str, str]]:
    """Return (kind of pair, methods, sentence) for everything that is refused at construction."""
    found: dict[tuple[str, str], list[str]] = {}
    for kind, (student, teacher, data) in KINDS.items():
        for method in list_distillers():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    build_distiller(method, student(), teacher(), data=data, seed=0)
            except DistillZooError as error:
                sentence = " ".join(str(error).split()).replace(f"{_class(method)} ", "The method ")
                found.setdefault((kind, sentence), []).append(method)
    return [(kind, ", ".join(methods), sentence) for (kind, sentence), methods in found.items()]


def _class(method: str) -> str:
    return str(DISTILLERS[method].__name__)


class Refusals(Directive):
    """A table of :func:`refusals`."""

    def run(self) -> list[nodes.Node]:
        """Return the table's nodes."""
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 25 25 50", ""]
        for row in [("Where", "Refused by", "What the error says"), *refusals()]:
            for number, cell in enumerate(row):
                text = cell.replace("\\", "\\\\").replace("*", "\\*").replace("`", "\\`").replace("|", "\\|")
                lines.append(f"   {'*' if number == 0 else ' '} - {text}")
        holder = nodes.container()
        self.state.nested_parse(StringList(lines, source="refusals"), self.content_offset, holder)
        return list(holder.children)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("refusals", Refusals)
    return {"parallel_read_safe": True}
