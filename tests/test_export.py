"""What a trained student is handed over as: weights, exported programs, a model card."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from torch import nn

from distillzoo import create_model, export
from distillzoo.errors import DistillZooError, MissingDependencyError, OptionError, RecordError
from distillzoo.export import StudentInfo, export_onnx, export_program, forward_flops, save_student, write_model_card

INFO = StudentInfo("tinycnn_8", ("a", "b", "c"), (16, 16), (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def student():
    torch.manual_seed(1)
    return create_model("tinycnn_8", num_classes=3)


@pytest.fixture
def batches():
    torch.manual_seed(2)
    return [torch.randn(number, 3, 16, 16) for number in (4, 4, 1)]


needs_onnx = pytest.mark.skipif(
    not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript")),
    reason="the extra onnx is not installed",
)
EXPORTS = [export_program, pytest.param(export_onnx, marks=needs_onnx)]


@pytest.mark.parametrize("write", EXPORTS)
def test_an_export_equals_the_network_and_leaves_it_alone(student, batches, tmp_path, write):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert student.training
    assert write(student, tmp_path / "student.x", batches) <= export.TOLERANCE
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["student.x"]


class Forgetful(nn.Module):
    """Computes other logits once it was exported: what tracing can do to a network that keeps state in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, images):
        return self.linear(images.mean((2, 3))) + (2e-4 if torch.compiler.is_exporting() else 0.0)


@pytest.mark.parametrize("write", EXPORTS)
def test_an_export_that_computes_something_else_is_refused(batches, tmp_path, write):
    with pytest.raises(RecordError, match=r"differ by up to 0\.0002, allowed is 0\.0001"):
        write(Forgetful(), tmp_path / "student.x", batches)
    assert not list(tmp_path.iterdir())


def test_an_export_of_which_one_batch_is_no_number_is_refused(student, batches, tmp_path):
    def load(path):
        return lambda images: student(images) * (math.nan if len(images) == 1 else 1.0)

    with pytest.raises(RecordError, match="differ by up to nan"):
        export._export("it", student, tmp_path / "student.x", batches, lambda _, path: path.write_bytes(b"x"), load)
    assert not list(tmp_path.iterdir())


class Untraceable(nn.Module):
    """Branches on the values of the images."""

    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


@pytest.mark.parametrize("write", EXPORTS)
def test_a_network_that_cannot_be_exported_is_refused_in_a_sentence(batches, tmp_path, write):
    with pytest.raises(RecordError, match="failed") as caught:
        write(Untraceable(), tmp_path / "student.x", batches)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_exports_need_a_batch_of_two(student, batches, tmp_path):
    for given in ([], batches[2:]):
        with pytest.raises(OptionError, match="at least 2 images"):
            export_program(student, tmp_path / "student.pt2", given)


def test_onnx_without_its_packages_says_what_to_install(student, batches, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(export.importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"distillzoo\[onnx\]"):
        export_onnx(student, tmp_path / "student.onnx", batches)


def test_weights_come_back(student, tmp_path):
    file = save_student(student, tmp_path / "new", INFO)
    loaded = create_model("tinycnn_8", num_classes=3, checkpoint_path=file)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in student.state_dict().items())
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["label_names"]) == ("tinycnn_8", 3, ["a", "b", "c"])
    assert sorted(path.name for path in file.parent.iterdir()) == ["config.json", "model.safetensors"]


def test_timm_names():
    for name, expected in [("timm/resnet18.a1_in1k", "resnet18"), ("torchvision/resnet18", None), ("resnet8", None)]:
        assert StudentInfo(name, ("a", "b"), (8, 8), (0.0,), (1.0,)).timm_name == expected


def test_flops_are_counted_twice_a_multiply_add(student):
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5, bias=False))
    assert forward_flops(linear, (4, 4)) == 2 * 48 * 5
    assert linear.training
    with pytest.raises((DistillZooError, RuntimeError)):
        forward_flops(linear, (5, 5))
    assert linear.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_card_of_a_student_of_half_precision(student, tmp_path, dtype):
    flops = forward_flops(student, (16, 16))
    write_model_card(tmp_path, student.to(dtype), INFO, accuracy=50.0, data="photos", recipe={})
    assert forward_flops(student, (16, 16)) == flops


def test_modes_of_single_modules_are_put_back(student, batches, tmp_path):
    norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[0].eval()  # a norm that its owner has frozen
    forward_flops(student, (16, 16))
    export_program(student, tmp_path / "student.pt2", batches)
    with pytest.raises(RecordError):
        export_program(student, tmp_path / "student.pt2", [batches[0], torch.zeros(1, 5, 16, 16)])
    assert student.training
    assert [norm.training for norm in norms] == [False, True, True]


def test_the_card_of_one_of_our_networks(student, tmp_path):
    text = write_model_card(tmp_path, student, INFO, accuracy=50.0, data="photos", recipe={"method": "a|b"}).read_text()
    assert "distillzoo.create_model('tinycnn_8', num_classes=3, checkpoint_path='model.safetensors')" in text
    assert "| method | a/b |" in text
    assert "50.00 % top-1" in text
