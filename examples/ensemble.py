"""Two teachers for one student: a list of teachers is one whose probabilities are averaged.

    python examples/ensemble.py

The second teacher was trained on other images than the student's: half the size and another normalisation. Both say what they want,
as timm's networks do, and each sees the student's crops in its own way.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from distillzoo import Distiller, build_distiller, create_model
from distillzoo.data import ResidentDataSet, load_dataset
from distillzoo.engine import TrainConfig, evaluate
from distillzoo.errors import UnsupportedPairError


def images_of(size: int, mean: float, std: float) -> ResidentDataSet:
    """The same classes at a size in pixels, minus a mean and divided by a deviation."""
    data = load_dataset("synthetic", num_classes=8, size=size, num_train=256, num_test=64)
    assert isinstance(data, ResidentDataSet)  # it lies in memory, which is where its normalisation can be changed
    return replace(data, spec=replace(data.spec, mean=(mean,) * 3, std=(std,) * 3))


def train(distiller: Distiller, data: ResidentDataSet, steps: int) -> None:
    """Run the shortest loop there is: images, loss, step."""
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
    distiller.train()
    batches = [batch for epoch in range(steps) for batch in data.train_loader(64, seed=0).epoch(epoch)]
    for batch in batches[:steps]:
        out = distiller(batch.images, batch.targets)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        distiller.after_step()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of every network")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    teachers = []
    data = images_of(16, 0.5, 0.25)
    for name, seen in (("tinycnn_32", data), ("resnet8", images_of(8, 0.0, 1.0))):
        alone = build_distiller("vanilla", create_model(name, num_classes=8), data=seen.spec, seed=0)
        train(alone, seen, options.steps)
        network = alone.export_student()
        wants = {"input_size": (3, *seen.spec.input_size), "mean": seen.spec.mean, "std": seen.spec.std}
        vars(network)["pretrained_cfg"] = wants
        teachers.append(network)

    student = create_model("tinycnn_8", num_classes=8)
    distiller = build_distiller("kd", student, teachers, data=data.spec, teacher_data="declared", seed=0)
    train(distiller, data, options.steps)
    config = TrainConfig(epochs=1)
    accuracy = evaluate(distiller.export_student(), data.eval_loader(64), config, torch.device("cpu"))[0]
    print(f"student of two teachers: {accuracy:.1f} %")

    try:
        build_distiller("reviewkd", student, teachers, data=data.spec, teacher_data="declared")
    except UnsupportedPairError as error:  # an average of probabilities has no feature maps
        print(f"reviewkd: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
