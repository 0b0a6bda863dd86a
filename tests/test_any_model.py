"""Networks of timm, torchvision and this project at 224 pixels: a method trains on a pair, or says at construction why not."""

from __future__ import annotations

import importlib.util
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from distillzoo import DataSpec, Teacher, build_distiller, create_model, list_distillers
from distillzoo.errors import UnsupportedPairError
from distillzoo.taps import Tapped

CLASSES = 10
DATA = DataSpec(
    CLASSES, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), targets=torch.arange(40) % CLASSES
)  # the labels are for methods with a memory
TEACHERS = (
    "timm/swin_tiny_patch4_window7_224",
    "timm/vit_small_patch16_224",
    "timm/convnext_tiny",
    "timm/resnet50",
    "torchvision/swin_t",
)
STUDENTS = (
    "timm/resnet18",
    "timm/mobilenetv2_100",
    "timm/mobilenetv3_large_100",
    "timm/efficientnet_b0",
    "torchvision/shufflenet_v2_x1_0",
    "shufflenetv1_224",
)
PAIRS = [*zip(TEACHERS, STUDENTS, strict=False), (TEACHERS[1], STUDENTS[5])]  # every teacher and every student
METHODS = list_distillers()
MUST = [name for name in ("kd", "reviewkd", "kdiffusion") if name in METHODS]
OPTIONS = {"crd": {"negatives": 8}}
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
    torch.manual_seed(0)
    return Teacher(create_model(name, num_classes=CLASSES), DATA)


def step(method: str, network: torch.nn.Module, taught_by: Teacher, data: DataSpec = DATA) -> None:
    """Build a distiller and make one training step of two images."""
    torch.manual_seed(1)
    options = OPTIONS.get(method, {})
    distiller = build_distiller(method, network, taught_by, data=data, seed=0, **options)
    distiller.train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-6)
    images = torch.randn(2, 3, *data.input_size)
    needs = distiller.requires
    out = distiller(
        images,
        torch.tensor([1, 3]),
        index=torch.tensor([1, 3]) if needs.index else None,
        second_view=images.flip(3) if needs.second_view else None,
    )
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(term) for term in out.terms.values())
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in distiller.parameters() if p.grad is not None)
    assert any(p.grad is not None and bool(p.grad.any()) for p in distiller.student.parameters())
    optimizer.step()
    distiller.after_step()


def trains_or_refuses(method: str, network: torch.nn.Module, taught_by: Teacher) -> None:
    try:
        step(method, network, taught_by)
    except UnsupportedPairError as error:
        refusal = str(error)
    else:
        return
    assert names_a_way_on(refusal), f"{method} refuses and names no way on: {refusal}"


def names_a_way_on(refusal: str) -> bool:
    """Whether a sentence names another method, or an argument."""
    return bool(set(re.findall(r"\w+", refusal)) & {*METHODS, "build_distiller"}) or re.search(r"\w=", refusal) is not None


@pytest.mark.parametrize(("taught_by", "student"), PAIRS)
def test_pairs_train(taught_by, student):
    for method in MUST:
        step(method, create_model(student, num_classes=CLASSES), teacher(taught_by))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_or_refuses(method):
    trains_or_refuses(method, create_model("timm/resnet18", num_classes=CLASSES), teacher(TEACHERS[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("taught_by", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
def test_the_whole_matrix(taught_by, student):
    for method in METHODS:
        trains_or_refuses(method, create_model(student, num_classes=CLASSES), teacher(taught_by))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    torch.manual_seed(0)
    network = create_model(name, num_classes=CLASSES)
    declared = (getattr(network, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    data = DataSpec(CLASSES, declared[1:])
    tapped = Tapped(network, data)
    shapes = [tapped.shapes[f"stage{number}"] for number in range(1, len(tapped.stages) + 1)]
    assert 2 <= len(shapes) <= 4
    assert all(shapes[k][1] >= shapes[k + 1][1] for k in range(len(shapes) - 1))
    assert len(tapped.shapes["pooled"]) == 1
    for method in ("ofd", "reviewkd"):
        step(method, create_model(name, num_classes=CLASSES), Teacher(network, data), data)


def test_the_table_of_refusals_is_found_by_trying():
    file = Path(__file__).resolve().parents[1] / "docs" / "_ext" / "refusals.py"
    spec = importlib.util.spec_from_file_location("refusals", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.refusals()
    refused = {kind: {name for other, names, _ in found if other == kind for name in names.split(", ")} for kind in module.KINDS}
    assert {"ofd", "reviewkd", "crd"} <= refused["several teachers as one"]
    assert "kd" not in refused["several teachers as one"]
    assert refused["a transformer teaches a convolutional network"].isdisjoint(MUST)
    assert refused["no teacher"] >= {"kd", "ofd"}
    assert "vanilla" not in refused["no teacher"]
    assert all(names_a_way_on(sentence) for _, _, sentence in found), found


# ------------------------------------------------------------------------------------- what the taps of some must be


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm/resnet18", ("layer4", "layer4.1.act2:input", "layer4.1.bn2", "fc:input", (512, 2, 2))),
        ("timm/mobilenetv3_small_050", ("blocks.5", "blocks.5.0.bn1.act:input", "blocks.5.0.bn1", "classifier:input", (288, 2, 2))),
        ("timm/repvgg_a0", ("final_conv", "stages.3.0.act:input", None, "head.fc:input", (1280, 2, 2))),
        ("timm/mobilenetv2_050", ("blocks.6", None, None, "classifier:input", (160, 2, 2))),
        ("torchvision/squeezenet1_1", ("features", None, None, "classifier.1:input", (512, 3, 3))),
        ("torchvision/mnasnet0_5", ("layers", "layers.16:input", "layers.15", "classifier.1:input", (1280, 2, 2))),
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
