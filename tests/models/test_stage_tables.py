"""The stages of torchvision's networks, checked against the modules themselves."""

import pytest
import torch
import torchvision
from torch import nn

from distillzoo.models import create_model
from distillzoo.models.stage_tables import torchvision_stages
from tests.models.reading import read_taps

# name: image size, (channels, size) of the stages
SMALL = {
    "resnet18": (64, [(64, 16), (128, 8), (256, 4), (512, 2)]),
    "resnet50": (64, [(256, 16), (512, 8), (1024, 4), (2048, 2)]),
    "resnext50_32x4d": (64, [(256, 16), (512, 8), (1024, 4), (2048, 2)]),
    "wide_resnet50_2": (64, [(256, 16), (512, 8), (1024, 4), (2048, 2)]),
    "regnet_y_400mf": (64, [(48, 16), (104, 8), (208, 4), (440, 2)]),
    "vgg11": (64, [(128, 32), (256, 16), (512, 8), (512, 4)]),
    "vgg11_bn": (64, [(128, 32), (256, 16), (512, 8), (512, 4)]),
    "densenet121": (64, [(256, 16), (512, 8), (1024, 4), (1024, 2)]),
    "shufflenet_v2_x0_5": (64, [(48, 8), (96, 4), (192, 2)]),
    "shufflenet_v2_x1_0": (96, [(116, 12), (232, 6), (464, 3)]),
    "mobilenet_v2": (64, [(24, 16), (32, 8), (96, 4), (320, 2)]),
    "mobilenet_v3_small": (64, [(16, 16), (24, 8), (48, 4), (96, 2)]),
    "mobilenet_v3_large": (224, [(24, 56), (40, 28), (112, 14), (160, 7)]),
    "efficientnet_b0": (64, [(24, 16), (40, 8), (112, 4), (320, 2)]),
    "efficientnet_v2_s": (64, [(48, 16), (64, 8), (160, 4), (256, 2)]),
    "convnext_tiny": (64, [(96, 16), (192, 8), (384, 4), (768, 2)]),
    "swin_t": (224, [(96, 56), (192, 28), (384, 14), (768, 7)]),
    "swin_v2_t": (64, [(96, 16), (192, 8), (384, 4), (768, 2)]),
    "vit_b_32": (224, [(768, 7)] * 4),
}
ADDITIVE = [name for name in SMALL if not name.startswith(("shufflenet", "densenet", "convnext", "swin_v2"))]
PRE = ("resnet", "resnext", "wide", "regnet", "vgg")


@pytest.fixture(scope="module", params=list(SMALL))
def network(request):
    torch.manual_seed(0)
    return request.param, create_model(f"torchvision/{request.param}", num_classes=4).eval()


def images(size):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


def as_map(value, layout):
    if layout == "nhwc":
        return value.permute(0, 3, 1, 2)
    if layout == "tokens":
        side = round((value.shape[1] - 1) ** 0.5)
        return value[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    return value


def clone_taps(model, size, paths):
    """Read taps as copies: torchvision's activations work in place."""
    return read_taps(model, images(size), paths, clone=True)[1]


def test_stage_shapes(network):
    name, model = network
    size, expected = SMALL[name]
    stages = torchvision_stages(model)
    taps = clone_taps(model, size, [stage.path for stage in stages])
    assert [tuple(as_map(taps[s.path], s.layout).shape[1:]) for s in stages] == [(c, s, s) for c, s in expected]


def test_pre_activations_are_what_the_stage_rectifies(network):
    name, model = network
    stages = torchvision_stages(model)
    assert all((stage.pre is not None) == name.startswith((*PRE, "densenet")) for stage in stages)
    if not name.startswith(PRE):
        return
    taps = clone_taps(model, SMALL[name][0], [path for stage in stages for path in (stage.path, stage.pre)])
    for stage in stages:
        assert taps[stage.pre].min() < 0
        assert torch.equal(taps[stage.pre].relu(), taps[stage.path])


def test_norms_follow_their_linear_ops(network):
    name, model = network
    for stage in torchvision_stages(model):
        if stage.linear_norm is not None:
            assert model.get_submodule(stage.linear_norm).num_features == model.get_submodule(stage.linear).out_channels
            taps = clone_taps(model, SMALL[name][0], [stage.linear, f"{stage.linear_norm}:input"])
            assert torch.equal(*taps.values())
        if stage.norm is not None:
            taps = clone_taps(model, SMALL[name][0], [stage.norm, stage.pre])
            assert taps[stage.norm].shape == taps[stage.pre].shape


def test_linear_ops_reach_the_tap_by_addition(network):
    """Scaling what the linear op adds by 0, 1 and 2 moves the tap by equal steps."""
    name, model = network
    if name not in ADDITIVE:
        return
    for stage in torchvision_stages(model):
        tap, values = stage.pre or stage.path, []
        for factor in (0.0, 1.0, 2.0):
            op = model.get_submodule(stage.linear_norm or stage.linear)
            handle = op.register_forward_hook(lambda m, a, out, factor=factor: out * factor)
            values.append(clone_taps(model, SMALL[name][0], [tap])[tap])
            handle.remove()
        step = values[1] - values[0]
        assert step.abs().max() > 0
        torch.testing.assert_close(values[2] - values[1], step, rtol=1e-3, atol=1e-4 * float(values[1].abs().max()))


def test_concatenating_networks_name_the_last_op(network):
    name, model = network
    if not name.startswith(("shufflenet", "densenet")):
        return
    for stage in torchvision_stages(model):
        assert isinstance(model.get_submodule(stage.linear), nn.Conv2d)
        before = clone_taps(model, SMALL[name][0], [stage.path])[stage.path]
        handle = model.get_submodule(stage.linear).register_forward_hook(lambda m, a, out: out + 1.0)
        after = clone_taps(model, SMALL[name][0], [stage.path])[stage.path]
        handle.remove()
        changed = (before != after).any(dim=(0, 2, 3)).sum().item()
        assert 0 < changed <= model.get_submodule(stage.linear).out_channels


def test_other_networks_are_not_known():
    assert torchvision_stages(nn.Linear(2, 2)) is None
    assert torchvision_stages(create_model("resnet8", num_classes=10)) is None
    assert torchvision_stages(torchvision.models.alexnet(num_classes=3)) is None


def test_subclasses_are_known_and_changed_networks_are_not():
    class Mine(torchvision.models.ResNet):
        pass

    model = Mine(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    assert [stage.path for stage in torchvision_stages(model)] == ["layer1", "layer2", "layer3", "layer4"]
    del model.layer4
    assert torchvision_stages(model) is None
    model = torchvision.models.resnet18()
    model.layer4 = nn.Sequential(nn.Conv2d(256, 512, 1))
    assert torchvision_stages(model) is None


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn"])
@pytest.mark.parametrize("end", ["cut", "identity", "average"])
def test_the_last_block_of_a_vgg_is_a_stage_without_its_pooling(name, end):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    whole = torchvision_stages(model)
    if end == "cut":
        model.features = model.features[:-1]
    else:
        model.features[-1] = nn.Identity() if end == "identity" else nn.AvgPool2d(2)
    assert torchvision_stages(model) == whole


def test_a_vgg_whose_last_activation_is_gone_is_nobodys():
    with torch.device("meta"):
        model = torchvision.models.vgg11()
    model.features = model.features[:-2]
    assert torchvision_stages(model) is None


def test_every_variant_has_a_full_table():
    """Built without memory or weights: the paths of the large ones exist as well."""
    prefixes = ("resn", "wide", "vgg", "dense", "shuffle", "mobile", "efficient", "convnext", "swin", "vit")  # RegNet needs memory
    names = [name for name in torchvision.models.list_models(module=torchvision.models) if name.startswith(prefixes)]
    assert len(names) > 45
    for name in names:
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None)
        assert len(torchvision_stages(model)) == (3 if name.startswith("shuffle") else 4), name
