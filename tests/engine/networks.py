"""Networks and loaders small enough to train whole runs in a test."""

import torch
from torch import Tensor, nn

from distillzoo.streams import Stream
from distillzoo.types import Batch, DataSpec, Stage


class SmallNet(nn.Module):
    def __init__(self, width: int, *, dropout: float = 0.0, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.act2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * width, classes)

    stages = (
        Stage("act1", "act1:input", "conv1", "bn1", "bn1"),
        Stage("act2", "act2:input", "conv2", "bn2", "bn2"),
    )
    classifier_path = "fc"

    def forward(self, images: Tensor) -> Tensor:
        maps = self.act1(self.bn1(self.conv1(images)))
        maps = self.act2(self.bn2(self.conv2(maps)))
        return self.fc(self.dropout(maps.mean((2, 3))))


class SmallLoader:
    """Random images whose label moves their mean: learnable; replayable through streams."""

    def __init__(self, samples: int = 30, batch_size: int = 8, *, seed: int = 0, shuffle: bool = True) -> None:
        index = torch.arange(samples * 3 * 8 * 8).view(samples, 3, 8, 8)
        self.targets = torch.arange(samples) % 4
        self.images = Stream.named(0, "test-images").normal(0, index) + self.targets.view(-1, 1, 1, 1)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.spec = DataSpec(4, (8, 8), num_samples=samples, targets=self.targets)
        self.epochs_served = []

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def epoch(self, epoch: int, *, phase: str = "main", second_view: bool = False):
        self.epochs_served.append((phase, epoch))
        order = torch.arange(len(self.images))
        if self.shuffle:
            order = Stream.named(self.seed, "order", phase).permutation(epoch, len(order))
        for index in order.split(self.batch_size):
            second = self.images[index].flip(3) if second_view else None
            yield Batch(self.images[index], self.targets[index], index, second)
