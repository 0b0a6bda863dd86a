"""Stop a run and go on later: the result is bit-equal to a run that was never stopped.

    python examples/resume.py --method crd

Everything that a run needs to go on is one dictionary of tensors and plain data; a file of it loads with weights_only=True. No
random state is stored: views, order and draws are functions of the seed and the step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from distillzoo import Teacher, build_distiller, create_model
from distillzoo.data import load_dataset
from distillzoo.engine import EpochReport, Observer, TrainConfig, Trainer
from distillzoo.streams import Stream, forked_generator


class Keeper(Observer):
    """Writes the state to a file when an epoch ends, and stops the run at one of them."""

    def __init__(self, file: Path, stop_after: int | None) -> None:
        self.trainer: Trainer | None = None
        self.file = file
        self.stop_after = stop_after

    def on_epoch(self, report: EpochReport) -> None:
        """Save, then stop if it is time."""
        assert self.trainer is not None
        torch.save(self.trainer.state(report.member), self.file)
        if self.stop_after == report.epoch + 1:
            raise KeyboardInterrupt


def make(method: str, epochs: int, keeper: Keeper) -> Trainer:
    """Set the same run up again: networks, distiller and loaders from the seed alone."""
    data = load_dataset("synthetic", num_classes=8, size=16, num_train=128, num_test=64)
    with forked_generator(Stream.named(0, "networks")):
        student, teacher = (create_model(name, num_classes=8) for name in ("tinycnn_8", "tinycnn_32"))
    shared = Teacher(teacher, data.spec)
    distiller = build_distiller(method, student, shared, data=data.spec, seed=0)
    config = TrainConfig(epochs=epochs, batch_size=32, lr=0.05, schedule="cosine")
    trainer = Trainer(
        {method: distiller}, shared, data.train_loader(32, seed=0), data.eval_loader(64), config, seed=0, observer=keeper
    )
    keeper.trainer = trainer
    return trainer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", default="fitnet")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "last.pt"
        unbroken = make(options.method, options.epochs, Keeper(Path(folder) / "other.pt", None))
        unbroken.run()

        try:
            make(options.method, options.epochs, Keeper(file, stop_after=1)).run()
        except KeyboardInterrupt:
            print(f"stopped after epoch 1 of {options.epochs}; {file.name} has {file.stat().st_size / 1024:.0f} KiB")
        resumed = make(options.method, options.epochs, Keeper(file, None))
        resumed.restore(options.method, torch.load(file, weights_only=True))
        resumed.run()
    states = [trainer.members[options.method].distiller.state_dict() for trainer in (unbroken, resumed)]
    equal = all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    print(f"the resumed run and the unbroken one are {'bit-equal' if equal else 'different'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
