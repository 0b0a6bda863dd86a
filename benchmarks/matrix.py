"""Try every method on pairs of timm's, torchvision's and this project's networks at 224 pixels, and print who trains whom.

    python benchmarks/matrix.py
    python benchmarks/matrix.py --teachers timm/resnet50 --students timm/resnet18,shufflenetv1_224 --methods kd,reviewkd
    python benchmarks/matrix.py --output benchmarks/results/any_model/matrix.md

A method trains on a pair when it is built without naming a layer and makes one training step of two images with a finite loss and
finite gradients; else it must refuse when it is built, with the reason and a way on. Networks have fresh weights. Exit code: 0 all
of them train or refuse, 1 some do neither, 2 wrong input.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distillzoo import DataSpec, Teacher, build_distiller, create_model, list_distillers
from distillzoo.build import resolve_distiller
from distillzoo.errors import DistillZooError, UnsupportedPairError

CLASSES = 10
DATA = DataSpec(
    CLASSES, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), targets=torch.arange(40) % CLASSES
)  # the labels are for methods with a memory
TEACHERS = (
    "timm/swin_tiny_patch4_window7_224",
    "timm/vit_small_patch16_224",
    "timm/convnext_tiny",
    "timm/resnet50",
    "torchvision/swin_t",
)
STUDENTS = (
    "timm/resnet18",
    "timm/mobilenetv2_100",
    "timm/mobilenetv3_large_100",
    "timm/efficientnet_b0",
    "torchvision/shufflenet_v2_x1_0",
    "shufflenetv1_224",
)
_OPTIONS: Mapping[str, Mapping[str, Any]] = {"crd": {"negatives": 8}}  # of forty images


class StepError(Exception):
    """A method neither trained nor refused as it should."""


def seeded_network(name: str, seed: int = 0) -> nn.Module:
    """Create a network of :data:`CLASSES` classes whose fresh weights depend on the seed alone."""
    torch.manual_seed(seed)
    return create_model(name, num_classes=CLASSES)


def train_one_step(method: str, student: nn.Module, teacher: Teacher, data: DataSpec = DATA) -> None:
    """Build a distiller, which takes the student over, and make one training step of two images.

    Raises:
        UnsupportedPairError: If the method refuses the pair.
        StepError: If a term or a gradient is not finite, or none reaches the student.
    """
    torch.manual_seed(1)
    distiller = build_distiller(method, student, teacher, data=data, seed=0, **_OPTIONS.get(method, {}))
    distiller.train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-6)
    images, labels, needs = torch.randn(2, data.channels, *data.input_size), torch.tensor([1, 3]), distiller.requires
    second = images.flip(3) if needs.second_view else None
    out = distiller(images, labels, index=torch.tensor([1, 3]) if needs.index else None, second_view=second)
    wrong = [name for name, value in (out.terms | {"loss": out.loss}).items() if not torch.isfinite(value)]
    if wrong:
        raise StepError(f"{method}: {', '.join(wrong)} of the first step is not finite.")
    out.loss.backward()
    gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    wrong = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
    if wrong:
        raise StepError(f"{method}: the gradients of {', '.join(wrong[:5])} are not finite.")
    if not any(bool(gradient.any()) for name, gradient in gradients.items() if name.startswith("student.")):
        raise StepError(f"{method}: no gradient reaches the student.")
    optimizer.step()
    distiller.after_step()


def refusal(method: str, student: nn.Module, teacher: Teacher, data: DataSpec = DATA) -> str | None:
    """Return the sentence with which a method refuses a pair, or None if it made a training step.

    Raises:
        StepError: If it did neither, or the sentence names no way on.
    """
    try:
        train_one_step(method, student, teacher, data)
    except UnsupportedPairError as error:
        sentence = " ".join(str(error).split())
    except DistillZooError as error:
        raise StepError(f"{method} fails on this pair and is no refusal: {type(error).__name__}: {error}") from error
    else:
        return None
    if not names_a_way_on(sentence):
        raise StepError(f"{method} refuses and names no way on: {sentence}")
    return sentence


def names_a_way_on(sentence: str) -> bool:
    """Whether a sentence names another method, or an argument."""
    return (
        bool(set(re.findall(r"\w+", sentence)) & {*list_distillers(), "build_distiller"}) or re.search(r"\w=", sentence) is not None
    )


def try_all(
    teachers: Sequence[str], students: Sequence[str], methods: Sequence[str], data: DataSpec = DATA
) -> tuple[dict[tuple[str, str, str], str], list[str]]:
    """Try all of them; returns by (teacher, student, method) the refusal, empty where it trained, and what failed."""
    found: dict[tuple[str, str, str], str] = {}
    failed: list[str] = []
    for taught_by in teachers:
        teacher = Teacher(seeded_network(taught_by), data)
        for name in students:
            student = seeded_network(name, seed=1)
            for method in methods:
                try:
                    found[taught_by, name, method] = refusal(method, copy.deepcopy(student), teacher, data) or ""
                except Exception as error:  # whatever it is: it is neither a training step nor a refusal
                    found[taught_by, name, method] = sentence = f"FAILED: {type(error).__name__}: {error}"
                    failed.append(f"{taught_by} -> {name}, {method}: {sentence}")
            print(f"{taught_by} -> {name}: done", file=sys.stderr, flush=True)
    return found, failed


def table(found: Mapping[tuple[str, str, str], str]) -> str:
    """Write the table: a row for each pair, a column for each method, the refusals numbered below."""
    methods = list(dict.fromkeys(method for _, _, method in found))
    sentences = list(dict.fromkeys(sentence for sentence in found.values() if sentence))
    lines = [f"| teacher | student | {' | '.join(methods)} |", f"|---|---|{':-:|' * len(methods)}"]
    for taught_by, student in dict.fromkeys((taught_by, student) for taught_by, student, _ in found):
        cells = [found[taught_by, student, method] for method in methods]
        shown = [f"[{sentences.index(cell) + 1}]" if cell else "yes" for cell in cells]
        lines.append(f"| {taught_by} | {student} | {' | '.join(shown)} |")
    trained = sum(not sentence for sentence in found.values())
    lines += ["", f"{trained} of {len(found)} train (yes); the others:" if sentences else f"All {len(found)} train (yes)."]
    return "\n".join([*lines, *(f"\n[{number}] {sentence}" for number, sentence in enumerate(sentences, 1))])


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", default=",".join(TEACHERS), metavar="A,B", help="default: the five of the tests")
    parser.add_argument("--students", default=",".join(STUDENTS), metavar="A,B", help="default: the six of the tests")
    parser.add_argument("--methods", default=",".join(list_distillers()), metavar="A,B", help="default: all")
    parser.add_argument("--size", type=int, default=DATA.input_size[0], metavar="PIXELS", help="of the images (default: 224)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the table goes as Markdown (default: the screen)")
    args = parser.parse_args(arguments)
    teachers, students, methods = (given.split(",") for given in (args.teachers, args.students, args.methods))
    try:
        for method in methods:
            resolve_distiller(method)  # a name that does not exist stops it before anything is tried
        found, failed = try_all(teachers, students, methods, replace(DATA, input_size=(args.size, args.size)))
    except DistillZooError as error:
        print(f"matrix.py: {error}", file=sys.stderr)
        return 2
    text = table(found)
    if args.output is None:
        print(text)
    else:
        words = [word for word in arguments if word != "--output" and word != str(args.output)]
        title = f"Made by `{' '.join(['python benchmarks/matrix.py', *words])}`: two images, one step, fresh weights."
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(f"# Which method trains which pair\n\n{title}\n\n{text}\n", encoding="utf-8")
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
