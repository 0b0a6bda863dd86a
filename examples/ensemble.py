"""Two teachers for one student: a list of teachers is one whose probabilities are averaged.

    python examples/ensemble.py

The second teacher wants other images than the student: half the size and another normalisation. It says so, as timm's networks do,
and sees the same crops in its own way.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from distillzoo import Distiller, build_distiller, create_model
from distillzoo.data import load_dataset
from distillzoo.engine import TrainConfig, evaluate
from distillzoo.errors import UnsupportedPairError


def train(distiller: Distiller, size: int, steps: int) -> None:
    """Run the shortest loop there is: images, loss, step."""
    data = load_dataset("synthetic", num_classes=8, size=size, num_train=256, num_test=64)
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
    for name, size in (("tinycnn_32", 16), ("resnet8", 8)):
        alone = build_distiller("vanilla", create_model(name, num_classes=8), input_size=size, seed=0)
        train(alone, size, options.steps)
        network = alone.export_student()
        vars(network)["pretrained_cfg"] = {"input_size": (3, size, size), "mean": (0.5,) * 3, "std": (0.25,) * 3}
        teachers.append(network)

    data = load_dataset("synthetic", num_classes=8, size=16, num_train=256, num_test=64)
    student = create_model("tinycnn_8", num_classes=8)
    distiller = build_distiller("kd", student, teachers, data=data.spec, teacher_data="declared", seed=0)
    train(distiller, 16, options.steps)
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
