"""Images a second of the two loaders of photographs, and of the parts of each: what bounds them.

    python benchmarks/perf/bench_folder.py PHOTOS [--workers 0,2] [--images 600] [--device cpu]

Packs PHOTOS into a temporary folder first and says how long that takes. Parts are timed alone on one thread; the slowest is the
bound. Files come from the page cache after the first pass. On a machine that does other things too only the figures of processor
time say something, and even those are too low.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distillzoo.data import CropViews, FolderDataSet, PackedDataSet, load_dataset, normalise, pack_folder, resize_each
from distillzoo.types import Batch

Rate = tuple[float, float]


def rate(action: Callable[[], int], device: torch.device) -> Rate:
    """Run once; return images a second of wall time, and of the processor time of this process and its workers."""
    busy, start = sum(os.times()[:4]), time.perf_counter()
    count = action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    gc.collect()  # ends the workers, whose time counts when they are gone
    return count / seconds, count / max(sum(os.times()[:4]) - busy, 1e-9)


def consume(batches: Iterable[Batch], number: int) -> int:
    """Take batches until there were enough images."""
    count = 0
    for batch in batches:
        count += len(batch.images)
        if count >= number:
            break
    return count


def parts_of_files(data: FolderDataSet, number: int) -> dict[str, float]:
    """Time what is done to one image file, step by step, in milliseconds an image."""
    views, seconds = data.augment, dict.fromkeys(("read", "decode", "crop and resize", "to tensor", "normalise"), 0.0)
    rows = torch.arange(min(number, len(data.train)))
    windows = views.draw(0, "first", "main", 0, rows, data.train.sizes[rows]).tolist()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (views.mean, views.std))
    for name, (top, left, height, width, _) in zip(data.train.names, windows, strict=False):
        times = [time.thread_time()]
        path = data.train.root / name
        path.read_bytes()
        times.append(time.thread_time())
        with Image.open(path) as file:
            image = file.convert("RGB")
        times.append(time.thread_time())
        view = image.crop((left, top, left + width, top + height)).resize((views.crop, views.crop), Image.Resampling.BILINEAR)
        times.append(time.thread_time())
        pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous()
        times.append(time.thread_time())
        normalise(pixels.unsqueeze(0), mean, std)
        times.append(time.thread_time())
        for part, before, after in zip(seconds, times, times[1:], strict=False):
            seconds[part] += after - before
    return {part: round(1000 * value / len(rows), 3) for part, value in seconds.items()}


def parts_of_packed(data: PackedDataSet, number: int) -> dict[str, float]:
    """Time what is done to one packed image on a CPU, step by step, in milliseconds an image."""
    views, seconds = data.augment, dict.fromkeys(("window", "resize", "normalise"), 0.0)
    rows = torch.arange(min(number, len(data.train)))
    windows = views.draw(0, "first", "main", 0, rows, data.train.sizes[rows]).tolist()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (views.mean, views.std))
    for row, (top, left, height, width, flip) in enumerate(windows):
        times = [time.thread_time()]
        window = data.train.window(row, top, left, height, width).clone()  # the loader's view, read from the file's pages
        times.append(time.thread_time())
        pixels = resize_each([window], [flip], views.crop)
        times.append(time.thread_time())
        normalise(pixels, mean, std)
        times.append(time.thread_time())
        for part, before, after in zip(seconds, times, times[1:], strict=False):
            seconds[part] += after - before
    return {part: round(1000 * value / len(rows), 3) for part, value in seconds.items()}


def told(what: str, parts: dict[str, float]) -> str:
    """Say what the parts take, and which of them is the bound."""
    most, total = max(parts, key=lambda part: parts[part]), sum(parts.values())
    listed = ", ".join(f"{part} {value:.2f}" for part, value in parts.items())
    share = 100 * parts[most] / total
    return f"{what}, ms of processor time an image: {listed}; bound by {most} ({share:.0f} %), {1000 / total:,.0f} images/s a core"


def normalise_rate(views: CropViews, batch_size: int, device: torch.device) -> Rate:
    """Images a second of normalisation alone, which happens on the device in the training process."""
    pixels = torch.randint(0, 256, (batch_size, 3, views.crop, views.crop), dtype=torch.uint8, device=device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (views.mean, views.std))

    def action() -> int:
        for _ in range(5):
            normalise(pixels, mean, std)
        return 5 * batch_size

    action()
    return rate(action, device)


def main() -> None:
    """Time everything and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--workers", default="0,2", help="numbers of worker processes, with commas between")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, found = torch.device(args.device), {}
    for workers in map(int, args.workers.split(",")):
        files = load_dataset("folder", root=args.photos, crop=args.crop, workers=workers)
        loader = files.train_loader(args.batch_size, seed=0, device=device)
        found[f"files, {workers} workers"] = rate(lambda loader=loader: consume(loader.epoch(0), args.images), device)  # type: ignore[misc]
    with tempfile.TemporaryDirectory(prefix="bench-packed-") as folder:
        start = time.perf_counter()
        index = pack_folder(args.photos, Path(folder) / "packed")
        print(f"packing: {time.perf_counter() - start:.1f} s, {index.summary}")
        packed = load_dataset("packed", root=Path(folder) / "packed", crop=args.crop).train_loader(
            args.batch_size, seed=0, device=device
        )
        consume(islice(packed.epoch(1), 2), args.images)
        images = load_dataset("packed", root=Path(folder) / "packed", crop=args.crop)
        assert isinstance(images, PackedDataSet)
        of_packed = parts_of_packed(images, min(args.images, 300))
        found["packed"] = rate(lambda: consume(packed.epoch(0), args.images), device)
    found["normalisation alone"] = normalise_rate(CropViews(crop=args.crop), args.batch_size, device)
    for name, (wall, busy) in found.items():
        print(f"{name}: {wall:,.0f} images/s; {busy:,.0f} a second of processor time")
    files = load_dataset("folder", root=args.photos, crop=args.crop, workers=0)
    assert isinstance(files, FolderDataSet)
    print(told("an image file", parts_of_files(files, min(args.images, 300))))
    print(told("a packed image", of_packed))


if __name__ == "__main__":
    main()
