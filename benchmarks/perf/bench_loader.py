"""Images a second of the resident loader: ``python -m pytest benchmarks/perf/bench_loader.py``.

50,000 images of 32x32x3, padded by 4, cropped, flipped, normalised; a whole epoch with its order and draws. The machine should be
quiet; the number of threads hardly matters, as batches are made on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from distillzoo.data import Augment, ResidentLoader, Split
from distillzoo.types import DataSpec

NUMBER = 50_000
MUST = 45_000  # images a second on two cores at batch 64


@pytest.fixture(scope="module")
def split() -> Split:
    """Random images of CIFAR's number and size, planes in memory as CIFAR's."""
    images = torch.randint(0, 256, (NUMBER, 3, 32, 32), dtype=torch.uint8).permute(0, 2, 3, 1)
    return Split(images, torch.arange(NUMBER) % 100)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set the number of threads for one measurement."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("batch_size", [64, 512])
def test_images_per_second(benchmark: Any, split: Split, threads: int, channels_last: bool, batch_size: int) -> None:
    """Time whole epochs; at batch 64 the slowest must still be fast enough."""
    spec = DataSpec(100, (32, 32), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    loader = ResidentLoader(split, spec, batch_size=batch_size, augment=Augment(4, flip=True), channels_last=channels_last)
    epochs = iter(range(1000))

    def one_epoch() -> int:
        return sum(len(batch.targets) for batch in loader.epoch(next(epochs)))

    assert benchmark.pedantic(one_epoch, rounds=5, warmup_rounds=1) == NUMBER
    rate = NUMBER / benchmark.stats.stats.median
    benchmark.extra_info.update(images_per_second=round(rate), threads=threads)
    print(f"\n{rate:,.0f} images/s ({threads} threads, batch {batch_size}, {'channels last' if channels_last else 'nchw'})")
    if batch_size == 64 and threads == 2:
        assert rate >= MUST
