"""Networks of timm, torchvision and this project at 224 pixels: a method trains on a pair, or says at construction why not."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from distillzoo import DataSpec, Teacher, create_model, list_distillers
from distillzoo.errors import TapError, UnsupportedPairError
from distillzoo.taps import Tapped

ROOT = Path(__file__).resolve().parents[1]


def load(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


matrix = load(ROOT / "benchmarks" / "matrix.py")

CLASSES, DATA, TEACHERS, STUDENTS = matrix.CLASSES, matrix.DATA, matrix.TEACHERS, matrix.STUDENTS
PAIRS = [*zip(TEACHERS, STUDENTS, strict=False), (TEACHERS[1], STUDENTS[5])]  # every teacher and every student
METHODS = list_distillers()
MUST = [name for name in ("kd", "reviewkd", "kdiffusion") if name in METHODS]
FAMILIES = (
    "timm/regnety_002", "timm/densenet121", "timm/efficientformer_l1", "timm/maxvit_rmlp_pico_rw_256",
    "timm/coatnet_0_rw_224", "timm/deit_tiny_distilled_patch16_224", "timm/beit_base_patch16_224", "timm/mixer_s32_224",
    "timm/resmlp_12_224", "timm/repvgg_a0", "timm/ghostnet_050", "timm/vgg11_bn", "timm/inception_v3",
    "timm/xcit_nano_12_p16_224", "timm/cait_xxs24_224", "timm/levit_128s", "timm/pit_ti_224", "timm/twins_svt_small",
    "timm/pvt_v2_b0", "timm/edgenext_xx_small", "timm/mobilevit_xxs", "timm/fastvit_t8", "timm/hrnet_w18_small",
    "timm/dla46_c", "timm/nfnet_f0", "timm/dpn48b", "timm/tresnet_m", "torchvision/squeezenet1_1", "torchvision/googlenet",
    "torchvision/inception_v3", "torchvision/alexnet", "torchvision/mnasnet0_5", "torchvision/maxvit_t",
    "torchvision/vit_b_32",
)  # fmt: skip


@lru_cache(maxsize=1)  # one at a time: five of them and their taps would fill a small machine
def teacher(name: str) -> Teacher:
    return Teacher(matrix.seeded_network(name), DATA)


@pytest.mark.parametrize(("taught_by", "student"), PAIRS)
def test_pairs_train(taught_by, student):
    for method in MUST:
        matrix.train_one_step(method, matrix.seeded_network(student), teacher(taught_by))


# gpd widens the whole network, in double precision to try it: gpd_reduced, the same with fewer parts, stands for it by default
@pytest.mark.parametrize("method", [pytest.param(name, marks=pytest.mark.slow) if name == "gpd" else name for name in METHODS])
def test_every_method_trains_or_refuses(method):
    matrix.refusal(method, matrix.seeded_network("timm/resnet18"), teacher(TEACHERS[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("taught_by", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
def test_the_whole_matrix(taught_by, student):
    for method in METHODS:
        matrix.refusal(method, matrix.seeded_network(student), teacher(taught_by))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    torch.manual_seed(0)
    network = create_model(name, num_classes=CLASSES)
    size = 299 if name == "torchvision/inception_v3" else 224  # torchvision's networks do not say what they want
    declared = (getattr(network, "pretrained_cfg", None) or {}).get("input_size", (3, size, size))
    data = DataSpec(CLASSES, declared[1:])
    tapped = Tapped(network, data)
    shapes = [tapped.shapes[f"stage{number}"] for number in range(1, len(tapped.stages) + 1)]
    assert 2 <= len(shapes) <= 4
    assert all(shapes[k][1] >= shapes[k + 1][1] for k in range(len(shapes) - 1))
    assert len(tapped.shapes["pooled"]) == 1
    for method in ("ofd", "reviewkd"):
        matrix.train_one_step(method, create_model(name, num_classes=CLASSES), Teacher(network, data), data)


def test_the_table_of_refusals_is_found_by_trying():
    module = load(ROOT / "docs" / "_ext" / "refusals.py")
    found = module.refusals()
    refused = {kind: {name for other, names, _ in found if other == kind for name in names.split(", ")} for kind in module.KINDS}
    assert {"ofd", "reviewkd", "crd"} <= refused["several teachers as one"]
    assert "kd" not in refused["several teachers as one"]
    assert refused["a transformer teaches a convolutional network"].isdisjoint(MUST)
    assert refused["no teacher"] >= {"kd", "ofd"}
    assert "vanilla" not in refused["no teacher"]
    assert all(matrix.names_a_way_on(sentence) for _, _, sentence in found), found


def test_the_matrix_is_printed_or_written(capsys, tmp_path):
    networks = ("--teachers", "resnet8", "--students", "tinycnn_8,resnet8", "--size", "32")
    assert matrix.main([*networks, "--methods", "vanilla,kd,crd"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| teacher | student | vanilla | kd | crd |"
    assert rows[2:4] == ["| resnet8 | tinycnn_8 | yes | yes | yes |", "| resnet8 | resnet8 | yes | yes | yes |"]
    assert "All 6 train" in rows[5]
    assert matrix.main([*networks, "--methods", "kd", "--output", str(tmp_path / "deep" / "matrix.md")]) == 0
    written = (tmp_path / "deep" / "matrix.md").read_text(encoding="utf-8")
    assert "| resnet8 | tinycnn_8 | yes |" in written
    assert f"`python benchmarks/matrix.py {' '.join(networks)} --methods kd`" in written


def test_refusals_stand_below_the_matrix():
    found = {("a", student, method): "Not so." if method == "crd" else "" for student in "bc" for method in ("kd", "crd")}
    rows = matrix.table(found).splitlines()
    assert rows[2:4] == ["| a | b | yes | [1] |", "| a | c | yes | [1] |"]
    assert rows[4:] == ["", "2 of 4 train (yes); the others:", "", "[1] Not so."]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UnsupportedPairError("It cannot."), "StepError: kd refuses and names no way on: It cannot."),
        (TapError("No such tap; use taps=."), "StepError: kd fails on this pair and is no refusal: TapError: No such tap"),
        (ValueError("17"), "ValueError: 17"),
    ],
)
def test_what_is_no_refusal_is_a_failure(capsys, monkeypatch, error, words):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(matrix, "build_distiller", fail)
    assert matrix.main(["--teachers", "resnet8", "--students", "resnet8", "--methods", "kd", "--size", "32"]) == 1
    streams = capsys.readouterr()
    assert f"[1] FAILED: {words}" in streams.out
    assert f"resnet8 -> resnet8, kd: FAILED: {words}" in streams.err


def test_wrong_names_stop_the_matrix(capsys):
    for wrong, hint in ((("--methods", "kdd"), "Did you mean 'kd'"), (("--teachers", "resnt8"), "Did you mean 'resnet8'")):
        assert matrix.main(["--methods", "kd", *wrong]) == 2
        assert hint in capsys.readouterr().err


# ------------------------------------------------------------------------------------- what the taps of some must be


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm/resnet18", ("layer4", "layer4.1.act2:input", "layer4.1.bn2", "fc:input", (512, 2, 2))),
        ("timm/mobilenetv3_small_050", ("blocks.5", "blocks.5.0.bn1.act:input", "blocks.5.0.bn1", "classifier:input", (288, 2, 2))),
        ("timm/repvgg_a0", ("final_conv", "stages.3.0.act:input", None, "head.fc:input", (1280, 2, 2))),
        ("timm/mobilenetv2_050", ("blocks.6", None, None, "classifier:input", (160, 2, 2))),
        ("torchvision/squeezenet1_1", ("features", None, None, "features.12", (512, 3, 3))),
        ("torchvision/mnasnet0_5", ("layers", "layers.16:input", "layers.15", "classifier:input", (1280, 2, 2))),
    ],
)
def test_convolutional_networks(name, expected):
    made = Tapped(create_model(name, num_classes=CLASSES), DataSpec(CLASSES, (64, 64)))
    last = made.stages[-1]
    path, pre, norm, pooled, shape = expected
    assert (last.path, last.pre, last.norm) == (path, pre, norm)
    assert (made.path("pooled"), made.shapes[f"stage{len(made.stages)}"]) == (pooled, shape)


@pytest.mark.parametrize(
    ("name", "options", "layout", "prefix", "shape"),
    [
        ("timm/deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 4}, "tokens", 2, (192, 4, 4)),
        ("timm/mixer_s32_224", {"img_size": 128}, "tokens", 0, (512, 4, 4)),
        ("timm/levit_128s", {"img_size": 64}, "tokens", 0, (384, 1, 1)),
        ("timm/pvt_v2_b0", {}, "nchw", 0, (256, 2, 2)),
        ("timm/swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 1, 1, 1)}, "nhwc", 0, (768, 2, 2)),
    ],
)
def test_tokens_and_channels_last(name, options, layout, prefix, shape):
    size = options.get("img_size", 64)
    made = Tapped(create_model(name, num_classes=CLASSES, **options), DataSpec(CLASSES, (size, size)))
    view = made._views[f"stage{len(made.stages)}"]
    assert (view.layout, view.prefix, made.shapes[f"stage{len(made.stages)}"]) == (layout, prefix, shape)
    assert len(made.shapes["pooled"]) == 1


def test_a_torchvision_transformer_built_by_its_own_constructor_has_a_grid():
    import torchvision

    network = torchvision.models.VisionTransformer(64, 16, 4, 2, 24, 48, num_classes=CLASSES)
    made = Tapped(network, DataSpec(CLASSES, (64, 64)))
    assert made.shapes["stage4"] == (24, 4, 4)
    assert made._views["stage4"].prefix == 1
