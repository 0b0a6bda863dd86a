"""Networks by name: three sources, near matches, refusals that say what to do."""

import pytest
import torch
from torch import nn

from distillzoo.errors import DistillZooError, OptionError, UnknownNameError
from distillzoo.models import MODELS, create_model, list_models, register_model, timm_config


def test_timm_by_name():
    model = create_model("timm/resnet10t", num_classes=7)
    assert model.get_classifier().out_features == 7


def test_torchvision_by_name():
    assert create_model("torchvision/shufflenet_v2_x0_5", num_classes=7).fc.out_features == 7


def test_torchvision_tokens_are_announced():
    assert create_model("torchvision/vit_b_32", num_classes=2).num_prefix_tokens == 1


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("resnet8x5", ["resnet8x4", "Registered"]),
        ("resnet26d", ["'timm/resnet26d'"]),
        ("timm/swin_tiny_patch4_window7", ["'timm/swin_tiny_patch4_window7_224'", "list_models('timm/*')"]),
        ("torchvision/swin_tiny", ["'torchvision/swin_t'", "list_models('torchvision/*')"]),
        ("torchvision/fasterrcnn_resnet50_fpn", ["Unknown"]),
    ],
)
def test_unknown_names_list_near_matches(name, parts):
    with pytest.raises(UnknownNameError) as error:
        create_model(name, num_classes=10)
    for part in [*parts, name]:
        assert part in str(error.value)
    assert len(str(error.value)) < 1200


def test_a_tag_that_a_network_of_timm_does_not_have_is_answered_with_its_tags():
    for ask in (timm_config, lambda name: create_model(name, num_classes=10)):
        with pytest.raises(
            UnknownNameError, match=r"Did you mean 'a1_in1k'.*Its tags are: .*fb_ssl_yfcc100m_ft_in1k.*Without a tag"
        ):
            ask("timm/resnet18.a1_in")
    assert timm_config("timm/resnet18").input_size == (3, 224, 224)
    assert timm_config("timm/nothing.a1_in1k") is timm_config("resnet8.a1_in1k") is None


@pytest.mark.parametrize("num_classes", [0, 1, -3, 2.0, True, "10", None])
@pytest.mark.parametrize("name", ["resnet8", "timm/resnet18", "torchvision/resnet18"])
def test_bad_num_classes(name, num_classes):
    with pytest.raises(OptionError, match="num_classes must be an integer of at least 2; got"):
        create_model(name, num_classes=num_classes)


def test_ours_have_no_weights_to_download():
    with pytest.raises(OptionError, match=r"No pretrained weights are shipped for 'resnet8'.*checkpoint_path"):
        create_model("resnet8", num_classes=10, pretrained=True)


@pytest.mark.parametrize("name", ["resnet8", "timm/resnet18", "torchvision/resnet18"])
def test_unknown_options_are_refused(name):
    with pytest.raises(OptionError, match="widht"):
        create_model(name, num_classes=10, widht=3)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("shufflenetv1", {"groups": 4}, "divisible by groups"),
        ("resnet8", {"depths": (1, 1)}, "longer"),
        ("mobilenetv2", {"width": "1"}, "TypeError"),
        ("vgg8", {"depths": 3}, "TypeError"),
    ],
)
def test_options_that_our_own_networks_cannot_be_built_with_are_explained(name, options, reason):
    with pytest.raises(
        OptionError, match=f"{name!r} could not be built with the options .*{reason}.*; see its constructor"
    ) as error:
        create_model(name, num_classes=10, **options)
    assert error.value.__cause__ is not None


def test_a_refusal_of_a_networks_own_is_left_as_it_is():
    with pytest.raises(OptionError, match=r"^groups must be an integer of at least 1; got 0"):
        create_model("shufflenetv1", num_classes=10, groups=0)


@pytest.mark.parametrize(
    ("name", "target"), [("timm/resnet18", "timm.create_model"), ("torchvision/resnet18", "torchvision.models.get_model")]
)
def test_failed_downloads_name_the_alternative(name, target, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(target, offline)
    with pytest.raises(OptionError, match=r"Name or service not known.*checkpoint_path") as error:
        create_model(name, num_classes=10, pretrained=True)
    assert isinstance(error.value.__cause__, ConnectionError)


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "vit_b_32"])
def test_torchvision_weights_get_a_fresh_classifier(arch, monkeypatch):
    import torchvision

    build, asked = torchvision.models.get_model, []

    def without_download(name, weights, **options):
        asked.append(weights)
        return build(name, weights=None, **options)

    monkeypatch.setattr(torchvision.models, "get_model", without_download)
    model = create_model(f"torchvision/{arch}", num_classes=11, pretrained=True).eval()
    assert asked == ["DEFAULT"]
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 11)


@pytest.mark.filterwarnings("ignore:auxiliary heads in the pretrained googlenet")
@pytest.mark.parametrize(("arch", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_what_began_with_torchvisions_weights_is_loaded_back(arch, size, tmp_path, monkeypatch):
    """Both have auxiliary classifiers and a renormalisation of the images, which torchvision sets with the weights."""
    import torchvision

    name, options = f"torchvision/{arch}", {"init_weights": False}
    published = torchvision.models.get_model(arch, weights=None, aux_logits=True, **options).state_dict()
    weights = torchvision.models.get_model_weights(arch)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: published)
    images = torch.randn(2, 3, size, size)
    for classes in (1000, 5):
        started = create_model(name, num_classes=classes, pretrained=True, **options)
        torch.save(started.state_dict(), tmp_path / "w.pt")
        loaded = create_model(name, num_classes=classes, checkpoint_path=tmp_path / "w.pt", **options)
        assert torch.equal(started.eval()(images), loaded.eval()(images))
        if classes == 1000:  # the published file itself, downloaded by other means
            torch.save(published, tmp_path / "published.pt")
            by_hand = create_model(name, num_classes=1000, checkpoint_path=tmp_path / "published.pt", **options)
            assert torch.equal(started(images), by_hand.eval()(images))
    options["aux_logits"] = True
    started = create_model(name, num_classes=5, pretrained=True, **options)
    torch.save(started.state_dict(), tmp_path / "w.pt")
    create_model(name, num_classes=5, checkpoint_path=tmp_path / "w.pt", **options)


def test_torchvisions_largest_transformer_is_of_the_size_of_its_weights(monkeypatch):
    """The published images are 518 pixels wide; without weights torchvision makes one for 224."""
    import torchvision

    class Asked(Exception):  # such a network has 632 million weights: what was asked for will do
        pass

    def refuse(**options):
        raise Asked(options["image_size"])

    monkeypatch.setattr(torchvision.models.vision_transformer, "VisionTransformer", refuse)
    weights = torchvision.models.get_model_weights("vit_h_14").DEFAULT
    published = weights.meta["min_size"][0]
    for options, size in (({}, published), ({"image_size": 224}, 224)):
        with pytest.raises(OptionError, match=f"Asked: {size}") as error:
            create_model("torchvision/vit_h_14", num_classes=5, **options)
        assert isinstance(error.value.__cause__, Asked)
    with pytest.raises(OptionError, match=f"Asked: {published}"):
        create_model("torchvision/vit_h_14", num_classes=5, pretrained=True)


def test_checkpoints_are_loaded_strictly(tmp_path):
    source = create_model("resnet8", num_classes=10)
    wrapped = {"state_dict": {f"module.{key}": value for key, value in source.state_dict().items()}, "epoch": 3}
    for number, content in enumerate([source.state_dict(), wrapped, {"model": source.state_dict()}]):
        torch.save(content, tmp_path / f"{number}.pt")
        model = create_model("resnet8", num_classes=10, checkpoint_path=tmp_path / f"{number}.pt")
        assert all(torch.equal(model.state_dict()[key], value) for key, value in source.state_dict().items())
    with pytest.raises(OptionError, match=r"does not fit ResNet.*fc\.weight"):
        create_model("resnet8", num_classes=11, checkpoint_path=tmp_path / "0.pt")
    with pytest.raises(OptionError, match="exclude each other"):
        create_model("resnet8", num_classes=11, checkpoint_path=tmp_path / "0.pt", pretrained=True)


def test_safetensors_and_foreign_checkpoints(tmp_path):
    from safetensors.torch import save_file

    for name in ("torchvision/shufflenet_v2_x0_5", "timm/resnet10t"):
        source = create_model(name, num_classes=5)
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        model = create_model(name, num_classes=5, checkpoint_path=tmp_path / "w.safetensors")
        assert all(torch.equal(model.state_dict()[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("wrn_16_2", {"block2.0.shortcut.weight", "block3.1.bn2.weight", "bn.bias", "block1.0.bn1.bias"}),
        ("resnet18", {"layer2.0.downsample.1.running_var", "fc.weight", "layer1.0.bn1.weight"}),
    ],
)
def test_published_checkpoints_are_translated(name, ours, tmp_path):
    def published(key):
        if name == "resnet18":
            return key.replace("downsample", "shortcut").replace("fc.", "linear.")
        if key.startswith("block"):
            group, _, rest = key.partition(".")
            return f"{group}.layer.{rest}".replace("shortcut", "convShortcut")
        return key.replace("bn.", "bn1.")

    source = create_model(name, num_classes=10)
    torch.save({"model": {published(key): value for key, value in source.state_dict().items()}}, tmp_path / "w.pt")
    loaded = create_model(name, num_classes=10, checkpoint_path=tmp_path / "w.pt").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())
    assert ours <= set(loaded)
    torch.save({"bn1.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(OptionError, match="does not fit"):
        create_model(name, num_classes=10, checkpoint_path=tmp_path / "w.pt")


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"junk", "cannot be read"), (Malicious(), "cannot be read"), ({"epoch": 3}, "holds no state dict.*epoch")],
)
def test_files_that_are_no_checkpoint(content, reason, tmp_path, capsys):
    path = tmp_path / "w.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(OptionError, match=reason):
        create_model("resnet8", num_classes=10, checkpoint_path=path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["resnet8", "timm/resnet10t", "torchvision/shufflenet_v2_x0_5"])
@pytest.mark.parametrize("file", ["w.pt", "w.safetensors"])
def test_a_checkpoint_that_is_not_there_is_one_sentence(name, file, tmp_path):
    with pytest.raises(OptionError, match=rf"^The checkpoint '.*{file}' does not exist; give the path of"):
        create_model(name, num_classes=10, checkpoint_path=tmp_path / file)
    (tmp_path / file).mkdir()
    with pytest.raises(OptionError, match=rf"^The checkpoint '.*{file}' is a folder; give the path of"):
        create_model(name, num_classes=10, checkpoint_path=tmp_path / file)


@pytest.mark.parametrize("prefix", ["_orig_mod.module.", "module._orig_mod.", "module.module.", "_orig_mod.module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped_in_any_order(prefix, tmp_path):
    source = create_model("resnet8", num_classes=10)
    torch.save({f"{prefix}{key}": value for key, value in source.state_dict().items()}, tmp_path / "w.pt")
    loaded = create_model("resnet8", num_classes=10, checkpoint_path=tmp_path / "w.pt").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())


def test_timm_names_a_checkpoint_that_does_not_fit(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(OptionError, match="checkpoint"):
        create_model("timm/resnet10t", num_classes=10, checkpoint_path=tmp_path / "w.pt")


def test_listing():
    everything = list_models()
    assert everything[: len(MODELS)] == sorted(MODELS)
    assert list_models("resnet8*") == ["resnet8", "resnet8x4"]
    assert "timm/resnet18" in everything
    foreign = list_models("*swin_t*")
    assert "torchvision/swin_t" in foreign
    assert "timm/swin_tiny_patch4_window7_224" in foreign
    assert list_models("nothing-like-this") == []


def test_users_register_their_own():
    @register_model("example_linear")
    class Linear(nn.Module):
        def __init__(self, num_classes, width=3):
            super().__init__()
            self.fc = nn.Linear(width, num_classes)

    try:
        assert create_model("example_linear", num_classes=4, width=5).fc.in_features == 5
        with pytest.raises(DistillZooError, match="taken"):
            register_model("example_linear")(nn.Module)
    finally:
        del MODELS._items["example_linear"]
