"""Teach a small network with a larger one: train a teacher, train a student with and without it, compare.

    python examples/quickstart.py --method kd --epochs 8

The images are synthetic, so that nothing is downloaded and the whole takes seconds on a CPU. They are easy: every student gets
nearly all of them right in the end, and which one does so first says nothing about real images. With data of your own the lines
stay the same: see distill_timm.py for a folder of images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from distillzoo import Distiller, DistillZooError, Teacher, build_distiller, create_model, list_distillers
from distillzoo.data import load_dataset
from distillzoo.engine import TrainConfig, Trainer, evaluate


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", default="kd", help=f"one of {', '.join(list_distillers())}, or several joined by '+'")
    parser.add_argument("--epochs", type=int, default=8, help="of every network")
    parser.add_argument("--images", type=int, default=512, help="training images")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        compare(options.method, options.epochs, options.images, options.seed)
    except DistillZooError as error:
        print(f"quickstart.py: {error}", file=sys.stderr)
        return 2
    return 0


def compare(method: str, epochs: int, images: int, seed: int) -> None:
    """Train teacher and students and print how often they are right."""
    data = load_dataset("synthetic", num_classes=8, size=16, num_train=images, num_test=256)
    config = TrainConfig(epochs=epochs, batch_size=64, lr=0.1, schedule="onecycle")

    def train(members: dict[str, Distiller], teacher: Teacher | None) -> dict[str, float]:
        loaders = data.train_loader(config.batch_size, seed=seed), data.eval_loader(256)
        results = Trainer(members, teacher, *loaders, config, seed=seed).run()
        return {name: result.last_accuracy or 0.0 for name, result in results.items()}

    large = build_distiller("vanilla", create_model("tinycnn_32", num_classes=8), data=data.spec, seed=seed)
    print(f"teacher            {train({'teacher': large}, None)['teacher']:5.1f} %")

    # the teacher is shared: it is run once for each batch, however many students it teaches
    teacher = Teacher(large.export_student(), data.spec)
    students = {
        name: build_distiller(name, create_model("tinycnn_8", num_classes=8), teacher, data=data.spec, seed=seed)
        for name in dict.fromkeys(("vanilla", method))
    }
    for name, accuracy in train(students, teacher).items():
        print(f"student, {name:<9} {accuracy:5.1f} %")

    plain = students[method].export_student()  # what you ship: no hooks, no adapters, no teacher
    print(f"exported: {type(plain).__name__}, {sum(p.numel() for p in plain.parameters()):,} parameters")
    accuracy = evaluate(plain, data.eval_loader(256), config, torch.device("cpu"))[0]
    print(f"exported is right  {accuracy:5.1f} % of the time")


if __name__ == "__main__":
    sys.exit(main())
