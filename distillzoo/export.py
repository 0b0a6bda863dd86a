"""Handing a trained student over: plain weights with their configuration, exported programs that were checked, a model card."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distillzoo.errors import MissingDependencyError, OptionError, RecordError

__all__ = ["TOLERANCE", "StudentInfo", "export_onnx", "export_program", "forward_flops", "save_student", "write_model_card"]

TOLERANCE = 1e-4
"""Largest difference of any logit between an exported program and the network that it came from."""

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


@dataclass(frozen=True)
class StudentInfo:
    """What has to be known of a student beside its weights.

    Args:
        architecture: Name that :func:`distillzoo.create_model` takes: ``"timm/resnet18"``, ``"torchvision/resnet18"``.
        class_names: Names of the classes, by label.
        input_size: Height and width of the images in pixels.
        mean: Mean of each channel that is subtracted from images scaled to 0..1.
        std: Standard deviation of each channel that they are divided by.
        crop_share: Share of the resized short side that is cut out of the middle: 224 of 256 is 0.875.
        license: Licence of the weights, as its owner would write it; they inherit from data and teacher.
        options: Options of the network, such as ``img_size``.
    """

    architecture: str
    class_names: tuple[str, ...]
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_share: float = 0.875
    license: str = "unknown"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def timm_name(self) -> str | None:
        """The name that timm knows the network by; ``None`` if it is not timm's."""
        source, _, name = self.architecture.rpartition("/")
        return name.partition(".")[0] if source == "timm" else None


def save_student(student: nn.Module, folder: str | os.PathLike[str], info: StudentInfo) -> Path:
    """Write ``model.safetensors`` and ``config.json``.

    A timm network is loaded back by ``timm.create_model(NAME, num_classes=N, checkpoint_path=FOLDER/model.safetensors)`` or
    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` (without ``pretrained`` timm gives it random weights); any by
    ``distillzoo.create_model(NAME, num_classes=N, checkpoint_path=...)``.

    Args:
        student: The plain student.
        folder: Where to write; made if it is not there.
        info: What the configuration says.
    Returns:
        The file of the weights.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous().clone() for name, value in student.state_dict().items()}
    weights = place / WEIGHTS
    packed = save(state, metadata={"format": "pt"})  # save_file would make a file that its owner alone may read
    _write(weights, lambda path: path.write_bytes(packed))
    text = json.dumps(_config(student, info), indent=2)
    _write(place / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    return weights


def export_program(student: nn.Module, path: str | os.PathLike[str], batches: Sequence[Tensor]) -> float:
    """Write the student as a ``torch.export`` program, load it back, and compare it with the student itself.

    Args:
        student: The plain student.
        path: The file to write, ``.pt2``.
        batches: ``(B, C, H, W)`` images each, at least one batch; B of the first at least 2.
    Returns:
        Largest difference of a logit over the batches.
    Raises:
        RecordError: If the network cannot be exported, or a logit differs by more than :data:`TOLERANCE`; no file is left.
    """

    def write(model: nn.Module, target: Path) -> None:
        shapes = {0: torch.export.Dim("batch", min=1, max=65_536)}
        torch.export.save(torch.export.export(model, (batches[0],), dynamic_shapes=(shapes,)), target)

    def load(target: Path) -> Callable[[Tensor], Tensor]:
        program = torch.export.load(target).module()
        return lambda images: program(images)

    return _export("torch.export", student, Path(path), batches, write, load)


def export_onnx(student: nn.Module, path: str | os.PathLike[str], batches: Sequence[Tensor]) -> float:
    """Write the student as an ONNX file, run it with ONNX Runtime, and compare it with the student itself.

    Args:
        student: The plain student.
        path: The file to write, ``.onnx``; the input is ``images``, the output ``logits``, the batch size free.
        batches: ``(B, C, H, W)`` images each, at least one batch; B of the first at least 2.
    Returns:
        Largest difference of a logit over the batches.
    Raises:
        MissingDependencyError: If the packages of the extra ``onnx`` are not installed.
        RecordError: If the network cannot be exported, or a logit differs by more than :data:`TOLERANCE`; no file is left.
    """
    try:
        onnxruntime = importlib.import_module("onnxruntime")
        importlib.import_module("onnxscript")  # torch needs it
    except ImportError as error:
        raise MissingDependencyError(
            f'ONNX export needs a package that is not installed ({error.name}); run pip install "distillzoo[onnx]", or do without.'
        ) from error

    def write(model: nn.Module, target: Path) -> None:
        torch.onnx.export(
            model,
            (batches[0],),
            str(target),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65_536)},),
            external_data=False,
            verbose=False,
        )

    def load(target: Path) -> Callable[[Tensor], Tensor]:
        session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return _export("ONNX", student, Path(path), batches, write, load)


def forward_flops(student: nn.Module, input_size: tuple[int, int], channels: int = 3) -> int:
    """Count the floating-point operations of a forward pass of one image, two for a multiply-add.

    Args:
        student: The network.
        input_size: Height and width of the image in pixels.
        channels: Channels of the image.
    """
    like = next((parameter for parameter in student.parameters() if parameter.is_floating_point()), torch.empty(0))
    counter = FlopCounterMode(display=False)
    with _evaluating(student), counter:
        student(torch.zeros((1, channels, *input_size), device=like.device, dtype=like.dtype))
    return int(counter.get_total_flops())


def write_model_card(
    folder: str | os.PathLike[str],
    student: nn.Module,
    info: StudentInfo,
    *,
    accuracy: float,
    data: str,
    recipe: Mapping[str, object],
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a short model card as ``README.md``.

    Args:
        folder: Where to write.
        student: The plain student.
        info: What is known of it.
        accuracy: Top-1 accuracy in per cent.
        data: The images that it was trained and measured on, in one line.
        recipe: How it was trained: names and values.
        files: Other files beside it, and what they are.
    Returns:
        The card.
    """
    height, width = info.input_size
    parameters = sum(parameter.numel() for parameter in student.parameters())
    flops = forward_flops(student, info.input_size, len(info.mean)) / 1e9
    count, options = len(info.class_names), "".join(f", {name}={value!r}" for name, value in info.options.items())
    call = f"timm.create_model({info.timm_name!r}" if info.timm_name else f"distillzoo.create_model({info.architecture!r}"
    package = "timm" if info.timm_name else "distillzoo"
    lines = [
        f"# {info.architecture}, distilled",
        "",
        f"- Accuracy: {accuracy:.2f} % top-1 after the last epoch",
        f"- Data: {data}",
        f"- Size: {parameters:,} parameters, {flops:.3f} GFLOPs for an image",
        f"- Licence of the weights: {info.license}",
        f"- Input: {height} x {width} pixels of 0..1, minus {_numbers(info.mean)}, divided by {_numbers(info.std)}",
        f"- Classes: {', '.join(info.class_names[:20])}{f' and {count - 20} more (config.json)' if count > 20 else ''}",
        "",
        "```python",
        f"import {package}",
        f"model = {call}, num_classes={count}, checkpoint_path={WEIGHTS!r}{options})",
        "```",
        "",
        "| recipe | |",
        "|---|---|",
        *(f"| {name} | {str(value).replace('|', '/')} |" for name, value in recipe.items()),
        *([""] if files else []),
        *(f"- `{name}`: {what}" for name, what in (files or {}).items()),
    ]
    card = Path(folder) / CARD
    _write(card, lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    return card


def _config(student: nn.Module, info: StudentInfo) -> dict[str, Any]:
    """Return the configuration in the form that timm reads from a folder."""
    features = getattr(student, "num_features", None)
    return {
        "architecture": info.timm_name or info.architecture,
        "num_classes": len(info.class_names),
        **({"num_features": features} if isinstance(features, int) else {}),
        "label_names": list(info.class_names),
        "model_args": dict(info.options),
        "pretrained_cfg": {
            "num_classes": len(info.class_names),
            "input_size": [len(info.mean), *info.input_size],
            "interpolation": "bilinear",
            "crop_pct": info.crop_share,
            "crop_mode": "center",
            "mean": list(info.mean),
            "std": list(info.std),
            "license": info.license,
        },
    }


def _export(
    kind: str,
    student: nn.Module,
    path: Path,
    batches: Sequence[Tensor],
    write: Callable[[nn.Module, Path], None],
    load: Callable[[Path], Callable[[Tensor], Tensor]],
) -> float:
    """Write under a temporary name, read back, compare, and only then give the file its name."""
    if not batches or len(batches[0]) < 2:
        raise OptionError(f"{kind} needs at least one batch, of at least 2 images; got {[len(batch) for batch in batches]}.")
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    advice = "use the weights themselves (model.safetensors), or another student"
    try:
        with _evaluating(student):
            write(student, partial)
            run = load(partial)
            gaps = [(run(batch) - student(batch)).abs().max().cpu() for batch in batches]
            worst = float(torch.stack(gaps).max())  # Python's own max would lose a nan behind a number
    except Exception as error:  # exporters raise whatever their many parts raise
        partial.unlink(missing_ok=True)
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise RecordError(
            f"{kind} of {type(student).__name__} failed ({type(error).__name__}: {reason}); a network that torch can trace is "
            f"needed; {advice}."
        ) from error
    if not worst <= TOLERANCE:  # nan is refused too
        partial.unlink(missing_ok=True)
        raise RecordError(
            f"{kind} of {type(student).__name__} computes other logits than the network: they differ by up to {worst:.3g}, "
            f"allowed is {TOLERANCE}; no file was left; {advice}."
        )
    partial.replace(path)
    return worst


@contextmanager
def _evaluating(student: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients; modules that were in a mode of their own are in it again afterwards."""
    flags = [(module, module.training) for module in student.modules()]
    student.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def _write(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"
