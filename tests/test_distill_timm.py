"""The example that distils any pair on any folder."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from distillzoo import create_model
from distillzoo.data.packing import pack_folder
from distillzoo.errors import DataError
from tests.data.pictures import make_tree

FILE = Path(__file__).resolve().parents[1] / "examples" / "distill_timm.py"


def load_example():
    spec = importlib.util.spec_from_file_location("distill_timm", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("example") / "photos", per_class=6)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    torch.save(create_model("tinycnn_32", num_classes=3).state_dict(), folder / "teacher.pt")
    return folder / "teacher.pt"


def command(photos: Path, output: Path, *more: str, epochs: int = 2) -> list[str]:
    return [
        *(
            "--data-root",
            str(photos),
            "--output",
            str(output),
            "--crop",
            "16",
            "--batch-size",
            "6",
            "--workers",
            "0",
            "--device",
            "cpu",
        ),
        *("--epochs", str(epochs), "--lr", "0.01", *more),
    ]


def tiny(photos: Path, output: Path, teacher_file: Path, *more: str, epochs: int = 2) -> list[str]:
    networks = ("--teacher", "tinycnn_32", "--student", "tinycnn_8", "--teacher-checkpoint", str(teacher_file))
    return command(photos, output, *networks, *more, epochs=epochs)


def test_a_timm_student_comes_out_whole(photos, tmp_path, capsys):
    """Teacher trained first, student distilled, exported, described; timm loads it and finds the same logits."""
    networks = ("--teacher", "tinycnn_32", "--teacher-epochs", "1", "--student", "timm/test_resnet", "--crop", "32")
    more = ("--student-option", "drop_rate=0.1", "--export", "--license", "CC0-1.0", "--option", "temperature=2")
    output = tmp_path / "out"
    assert example.main(command(photos, output, *networks, *more, epochs=1)) == 0
    said = capsys.readouterr().out
    assert "18 training and 6 test images" in said
    assert {path.name for path in output.iterdir()} == {
        *("model.safetensors", "config.json", "README.md", "settings.json", "student.pt2", "teacher"),
    }
    loaded = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(output / "model.safetensors")).eval()
    program = torch.export.load(output / "student.pt2").module()
    images = torch.randn(5, 3, 32, 32)
    assert (loaded(images) - program(images)).abs().max() <= 1e-4
    by_folder = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
    assert torch.equal(by_folder(images), loaded(images))
    assert tuple(by_folder.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)  # as timm says of this network
    card = (output / "README.md").read_text()
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    for words in (
        f"{parameters:,} parameters",
        "GFLOPs",
        "Licence of the weights: CC0-1.0",
        "temperature=2",
        "ce=0.1, kd=0.9",
        "which sees 32 x 32 pixels",
        "ant, bee, cow",
        "% top-1",
    ):
        assert words in card


def test_an_interrupted_call_goes_on_and_equals_an_unbroken_one(photos, teacher_file, tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert example.main(tiny(photos, whole, teacher_file, epochs=3)) == 0
    real, steps = example.Watch.on_step, []

    def stop(self, report):
        steps.append(report)
        if len(steps) == 5:  # in the second epoch of three steps each
            raise KeyboardInterrupt
        real(self, report)

    monkeypatch.setattr(example.Watch, "on_step", stop)
    assert example.main(tiny(photos, broken, teacher_file, epochs=3)) == 130
    assert "goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert not (broken / "model.safetensors").exists()
    assert example.main(tiny(photos, broken, teacher_file, epochs=3)) == 0
    assert "going on after 3 of 9 steps" in "".join(capsys.readouterr())
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (broken / "student.last.pt").exists()
    monkeypatch.setattr(example.Trainer, "run", lambda self: pytest.fail("a finished student was trained again"))
    assert example.main(tiny(photos, broken, teacher_file, "--export", epochs=3)) == 0
    assert (broken / "student.pt2").is_file()


def test_a_preset_of_the_method_is_a_weight_too(photos, teacher_file, tmp_path, capsys):
    assert example.main(tiny(photos, tmp_path / "out", teacher_file, "--weight", "imagenet", epochs=1)) == 0
    assert "ce=0.5, kd=0.5" in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    assert example.main(tiny(photos, tmp_path / "new", teacher_file, "--weight", "imagenett")) == 2
    assert "'imagenett'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_packed_images_are_taken_as_such(photos, teacher_file, tmp_path, capsys):
    pack_folder(photos, tmp_path / "packed", short_side=18)
    assert example.main(tiny(tmp_path / "packed", tmp_path / "out", teacher_file, epochs=1)) == 0
    assert "another protocol" in capsys.readouterr().out
    assert "another protocol" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--method", "kdd"), "Did you mean 'kd'"),
        (("--option", "temperature"), "NAME=VALUE"),
        (("--option", "temprature=2"), "temprature"),
        (("--student", "timm/resnet8"), "timm/resnet8"),
        (("--student", "timm/resnet18.a1_in"), "Did you mean 'a1_in1k'"),
        (("--teacher", "timm/resnet18.a1_in"), "Did you mean 'a1_in1k'"),
        (("--teacher", "tinycnn_8"), "does not fit"),
        (("--data-root", "nowhere"), "does not exist"),
        (("--crop", "0"), "crop must be"),
        (("--epochs", "0"), "epochs"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(photos, teacher_file, tmp_path, capsys, more, words):
    assert example.main([*tiny(photos, tmp_path / "out", teacher_file), *more]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--teacher", "tinycnn_32", "--teacher-checkpoint", "nowhere.pt"), "The checkpoint 'nowhere.pt' does not exist"),
        (("--teacher", "tinycnn_32", "--teacher-epochs", "-1"), "--teacher-epochs must be 0"),
        (("--teacher", "timm/test_resnet", "--pretrained"), "could not be had"),
    ],
)
def test_a_teacher_that_cannot_be_had_leaves_nothing(photos, tmp_path, capsys, monkeypatch, more, words):
    """The corrected command is another one, and would be refused in a folder that the wrong one had made its own."""
    real = timm.create_model

    def offline(name, **options):
        if options["pretrained"]:
            raise ConnectionError("Name or service not known")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    student = tmp_path / "student.pt"
    torch.save(create_model("tinycnn_8", num_classes=3).state_dict(), student)
    base = command(photos, tmp_path / "out", "--student", "tinycnn_8", "--student-checkpoint", str(student), epochs=1)
    assert example.main([*base, *more]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert example.main([*base, "--teacher", more[1], "--teacher-epochs", "0"]) == 0


def test_an_output_folder_whose_settings_are_none_is_refused(photos, teacher_file, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text("[]")
    assert example.main(tiny(photos, tmp_path / "out", teacher_file)) == 2
    assert "cannot be used" in capsys.readouterr().err


def test_a_run_may_go_on_on_another_device(photos, teacher_file, tmp_path, monkeypatch):
    """A GPU that is there makes the same command, without --device, one for it, and with it the layout of the images."""
    configs, claim = [], example.check_output

    def check(args, data, config):
        configs.append((args.device, config.channels_last))
        example.claim_output(args, claim(args, data, config))
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "check_output", check)
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert example.main([*tiny(photos, tmp_path / "out", teacher_file), "--device", "auto"]) == 130
    assert configs == [("cpu", False), ("cuda", True)]


def test_an_output_folder_of_another_run_is_refused_before_networks_are_made(photos, teacher_file, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(json.dumps({"method": "at"}))
    monkeypatch.setattr(example, "create_model", lambda *args, **options: pytest.fail("a network was made"))
    assert example.main(tiny(photos, tmp_path / "out", teacher_file)) == 2
    assert "holds another run" in capsys.readouterr().err


def test_a_teacher_sees_what_its_own_configuration_says(tmp_path):
    file = tmp_path / "model.safetensors"
    assert example.declared("timm/test_resnet", file) == {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # any size will do
    assert example.declared("timm/vit_tiny_patch16_224")["input_size"] == (224, 224)  # no other will
    saved = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "input_size": [3, 40, 40]}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": saved}))
    found = example.declared("timm/test_resnet", file)
    assert found == {"mean": (0.1, 0.2, 0.3), "std": (1, 1, 1), "input_size": (40, 40)}
    assert example.declared("tinycnn_8") == {}


@pytest.mark.parametrize(
    "written", ["{}", "[1]", "7", '{"pretrained_cfg": null}', '{"pretrained_cfg": []}', '{"pretrained_cfg": {}}']
)
def test_what_a_configuration_does_not_say_of_a_teacher_timm_says(tmp_path, written):
    """As the config.json of another package's model, which lies beside its weights too."""
    (tmp_path / "config.json").write_text(written)
    file = tmp_path / "model.safetensors"
    assert example.declared("timm/resnet18", file) == {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    assert example.declared("timm/vit_tiny_patch16_224", file)["input_size"] == (224, 224)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (b'{"pretrained_cfg": ', "cannot be read"),
        (b"\xff", "cannot be read"),
        (b'{"pretrained_cfg": {"mean": 0.5}}', r"pretrained_cfg\.mean .* must be a list of numbers; got 0\.5"),
        (b'{"pretrained_cfg": {"std": ["a", "b", "c"]}}', r"pretrained_cfg\.std .* must be a list of numbers"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_a_sentence(tmp_path, written, words):
    (tmp_path / "config.json").write_bytes(written)
    with pytest.raises(DataError, match=words):
        example.declared("timm/resnet18", tmp_path / "model.safetensors")


def test_a_teacher_of_another_size_is_trained_on_what_it_will_see(photos, tmp_path, capsys, monkeypatch):
    """The student reads 16 pixels, the teacher the same crops at 32; both calls agree on what it sees."""
    seen = []
    real = example.OwnView.__call__
    monkeypatch.setattr(
        example.OwnView, "__call__", lambda self, images: seen.append((images.shape[2], self.size)) or real(self, images)
    )
    networks = ("--teacher", "timm/test_vit", "--teacher-option", "img_size=32", "--teacher-crop", "32", "--student", "tinycnn_8")
    words = command(photos, tmp_path / "out", *networks, "--teacher-epochs", "1", epochs=1)
    assert example.main(words) == 0
    assert set(seen) == {(16, (32, 32))}
    accuracies = re.findall(r"Teacher timm/test_vit: (\d+\.\d+) %", capsys.readouterr().out)
    assert json.loads((tmp_path / "out/teacher/config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 32, 32]
    (tmp_path / "out/model.safetensors").unlink()  # the student again, with the teacher from the first call
    assert example.main(words) == 0
    assert re.findall(r"Teacher timm/test_vit: (\d+\.\d+) %", capsys.readouterr().out) == accuracies
    checkpoint = ("--teacher-checkpoint", str(tmp_path / "out/teacher/model.safetensors"))  # what lies beside it says the size
    elsewhere = (*networks[:4], *networks[6:], *checkpoint)
    assert example.main(command(photos, tmp_path / "elsewhere", *elsewhere, epochs=1)) == 0


def test_a_network_that_takes_no_other_size_is_refused_by_the_options_names(photos, tmp_path, capsys):
    networks = ("--teacher", "tinycnn_32", "--student", "timm/deit_tiny_patch16_224")
    assert example.main(command(photos, tmp_path / "out", *networks)) == 2
    said = capsys.readouterr().err
    assert "does not run on 3-channel images of 16x16" in said
    assert "--crop is the student's size and --teacher-crop the teacher's" in said
    assert not (tmp_path / "out").exists()
