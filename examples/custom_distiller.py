"""A method of your own in 30 lines, outside the package, and the checks that every method here passes.

python examples/custom_distiller.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo import DataSpec, Distiller, build_distiller, create_model, register_distiller
from distillzoo.schedules import Weight
from distillzoo.taps import Tapped, Teacher
from distillzoo.testing import check_distiller
from distillzoo.types import Batch, Requires, Trace


@register_distiller("example_centred")
class Centred(Distiller):
    """Match the last map of the student to the teacher's, each less its own mean over the positions."""

    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {"default": {"ce": 1.0, "shape": 2.0}}

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        self.pair = self.stage_pairs()[-1]  # any two networks: shapes are measured, stages are found
        self.requires = Requires(student_taps=self.pair[:1], teacher_taps=self.pair[1:])
        assert teacher is not None  # the base has refused a pair without one
        self.project = nn.Conv2d(student.shapes[self.pair[0]][0], teacher.shapes[self.pair[1]][0], 1)

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return ``shape``."""
        assert teacher is not None
        target = teacher.features[self.pair[1]]
        own = F.adaptive_avg_pool2d(self.project(student.features[self.pair[0]]), (target.shape[2], target.shape[3]))
        return {"shape": F.mse_loss(own - own.mean((2, 3), keepdim=True), target - target.mean((2, 3), keepdim=True))}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--skip-compile", action="store_true", help="leave out the one check that takes seconds")
    options = parser.parse_args(arguments)
    networks = (create_model(name, num_classes=10) for name in ("resnet8", "wrn_16_2"))
    distiller = build_distiller("example_centred", *networks, input_size=32, seed=0)
    out = distiller(torch.randn(4, 3, 32, 32), torch.arange(4))
    for name, term in out.terms.items():
        print(f"{name:<6} {term.item():.4f}  times {out.weights[name].item():g}")
    check_distiller("example_centred", skip={"check_compile": "it takes seconds"} if options.skip_compile else None)
    print("the contract holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
