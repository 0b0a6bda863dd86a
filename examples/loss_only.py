"""The losses alone, in a loop of your own: plain functions of tensors, no distiller, no trainer.

python examples/loss_only.py --steps 20
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from distillzoo import create_model
from distillzoo.data import load_dataset
from distillzoo.functional import dkd_loss, sp_loss
from distillzoo.taps import Tapped, Teacher


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    data = load_dataset("synthetic", num_classes=8, size=16, num_train=256, num_test=64)
    student, network = (create_model(name, num_classes=8) for name in ("tinycnn_8", "tinycnn_32"))

    # taps read feature maps of any network; whoever has them already needs none
    own, teacher = Tapped(student, data.spec), Teacher(network, data.spec)
    own.request("last")
    teacher.request("last")
    (own_last,), (teacher_last,) = own.names("last"), teacher.names("last")
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)

    first, loss = None, torch.zeros(())
    batches = [batch for epoch in range(options.steps) for batch in data.train_loader(64, seed=0).epoch(epoch)][: options.steps]
    for batch in batches:
        taught, known = own(batch.images), teacher(batch.images)
        logits = dkd_loss(taught.logits, known.logits, batch.targets, temperature=4.0)
        similarity = sp_loss(taught.features[own_last], known.features[teacher_last])
        loss = F.cross_entropy(taught.logits, batch.targets) + logits + 3000.0 * similarity
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        first = loss.item() if first is None else first
    print(f"loss {first or 0.0:.3f} at the first step, {loss.item():.3f} at the last of {len(batches)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
