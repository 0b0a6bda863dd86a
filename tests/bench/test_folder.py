"""Any folder of images through the command line: ids, captions, packed images, a teacher with a normalisation of its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distillzoo.bench import runner
from distillzoo.bench.plan import make_plan
from distillzoo.bench.recipe import apply_override, load_recipe, make_recipe
from distillzoo.bench.rows import load_table
from distillzoo.bench.views import as_view, describe_view, published_weights
from distillzoo.data import load_dataset, pack_folder
from distillzoo.errors import OptionError, UnknownNameError
from distillzoo.models import create_model
from distillzoo.types import DataSpec
from tests.bench.conftest import Call, records
from tests.data.pictures import make_tree

RECIPE = """
name: tiny
dataset: folder
pairs: [tinycnn_32:tinycnn_8]
table: digits
methods: [vanilla, kd]
seeds: [0]
data: {crop: 16, workers: 0}
teacher: {epochs: 1, batch_size: 8, lr: 0.05, schedule: onecycle}
student: {epochs: 2, batch_size: 8, lr: 0.05, schedule: onecycle}
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photos``, ``packed`` from it, and the recipe."""
    root = tmp_path_factory.mktemp("folder")
    pack_folder(make_tree(root / "photos"), root / "packed", short_side=18)
    (root / "tiny.yaml").write_text(RECIPE)
    return root


def arguments(places: Path, output: Path, *more: str, data: str | None = "photos") -> list[str]:
    root = [] if data is None else ["--data-root", str(places / data)]
    return ["--recipe", str(places / "tiny.yaml"), "--output", str(output), *root, *more]


def identities(output: Path) -> dict[str, dict[str, Any]]:
    return {method: json.loads((path / "result.json").read_text())["identity"] for (method, _), path in records(output).items()}


def test_files_and_packed_images_are_two_protocols_in_one_folder(places: Path, call: Call, tmp_path: Path) -> None:
    files = call(*arguments(places, tmp_path))
    assert files.code == 0, files.err
    assert "photos (image folder), 12 training and 6 test images" in files.out
    plain = identities(tmp_path)
    assert plain["kd"]["data"]["name"] == "folder"
    assert "source='image files'" in plain["kd"]["data"]["augment"]
    packed = call(*arguments(places, tmp_path, "--packed", data="packed"))
    assert packed.code == 0, packed.err
    assert "photos (packed at short side 18: another protocol than image files)" in packed.out
    assert "recipe with data.packed true, n = " in packed.out
    assert len(list(tmp_path.glob("*/result.json"))) == 4
    both = [json.loads(path.read_text())["identity"]["data"]["name"] for path in tmp_path.glob("*/result.json")]
    assert sorted(both) == ["folder", "folder", "folder_packed", "folder_packed"]
    for option, shown in (([], files), (["--packed"], packed)):  # without the images: each protocol finds its own records
        again = call(*arguments(places, tmp_path, "--table-only", *option, data=None))
        assert (again.code, again.err) == (0, "")
        assert again.out.strip() in shown.out


def test_how_files_are_read_is_no_part_of_an_id_or_caption(places: Path, call: Call, tmp_path: Path) -> None:
    first = call(*arguments(places, tmp_path))
    again = call(*arguments(places, tmp_path, "--data.workers", "1", "--data.skip_bad", "true"))
    assert again.code == 0
    assert again.out.strip() in first.out, "nothing was trained, and the caption says the same"
    plan_ids = []
    recipe = load_recipe(places / "tiny.yaml")
    for data in ({"crop": 16}, {"crop": 16, "workers": 3, "skip_bad": True}, {"crop": 16, "resize": 20}):
        changed = replace(recipe, data=data)
        images = load_dataset("folder", root=places / "photos", **data)
        plan_ids.append(list(make_plan(changed, load_table("digits"), lambda _, images=images: images).runs))
    assert plan_ids[0] == plan_ids[1]
    assert not set(plan_ids[0]) & set(plan_ids[2])
    packed = [load_dataset("folder", root=places / "packed", packed=True, verify=verify, crop=16) for verify in (False, True)]
    assert packed[0].digest == packed[1].digest


WRONG = [
    ("photos", ["--packed"], "no index.json"),
    ("packed", [], "--packed"),
    ("nowhere", [], "does not exist"),
    (None, [], "needs a data root"),
    ("packed", ["--packed", "--data.resize", "20"], "packed with a short side of 18"),
    ("photos", ["--data.workers", "-1"], "workers must be a whole number"),
    ("photos", ["--data.corp", "8"], "Did you mean 'crop'"),
    ("photos", ["--class-list", "cmc"], "Unknown option of data set 'folder' 'class_list'"),
    ("photos", ["--allow-missing-classes"], "Unknown option of data set 'folder' 'allow_missing_classes'"),
    ("photos", ["--teacher-head", "cut"], "Unknown teacher head 'cut'. Allowed: own, slice"),
    ("photos", ["--teacher-head", "slice"], "no published weights of 'tinycnn_32'"),
    ("photos", ["--teacher", "timm/test_resnet", "--teacher-head", "slice"], "the first is 'ant'"),
    ("photos", ["--teacher_data.men", "declared"], "Did you mean 'mean'"),
    ("photos", ["--teacher_data.mean", "[1, 2]"], "3 numbers, one a channel"),
    ("photos", ["--teacher_data.mean", "[.nan, 0, 0]"], "3 numbers, one a channel"),
    ("photos", ["--teacher_data.std", "[1, 0, 1]"], "above 0"),
    ("photos", ["--teacher_data.input_size", "[8.5, 8]"], "2 whole numbers of pixels"),
    ("photos", ["--teacher", "timm/vit_tiny_patch16_224"], "The teacher timm/vit_tiny_patch16_224 does not run on images of 16x16"),
    (
        "photos",
        ["--pairs", "tinycnn_32:timm/vit_tiny_patch16_224"],
        "The student timm/vit_tiny_patch16_224 does not run on images of 16x16",
    ),
]


@pytest.mark.parametrize(("data", "more", "words"), WRONG, ids=[" ".join([str(data), *more]) for data, more, _ in WRONG])
def test_wrong_input(data: str | None, more: list[str], words: str, places: Path, call: Call, tmp_path: Path) -> None:
    outcome = call(*arguments(places, tmp_path / "runs", *more, data=data))
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_file_that_breaks_while_it_is_read_ends_the_group_by_its_name(places: Path, call: Call, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    shutil.copytree(places / "photos", root)
    bad = root / "train" / "bee" / "001.png"
    bad.write_bytes(bad.read_bytes()[:200])  # its head is whole
    outcome = call("--recipe", str(places / "tiny.yaml"), "--data-root", str(root), "--output", str(tmp_path / "runs"))
    assert outcome.code == 1
    assert str(bad) in outcome.err
    assert "--data.skip_bad true" in outcome.err
    skipped = ["--data.skip_bad", "true", "--output", str(tmp_path / "runs")]
    outcome = call("--recipe", str(places / "tiny.yaml"), "--data-root", str(root), *skipped)
    assert outcome.code == 0
    assert "without 1 unusable file" in outcome.out


def test_a_teacher_from_elsewhere_sees_what_it_declares(places: Path, call: Call, tmp_path: Path) -> None:
    network = create_model("timm/test_resnet", num_classes=3)
    torch.save(network.state_dict(), tmp_path / "teacher.pt")
    view = {"mean": "declared", "std": "declared", "input_size": "declared"}
    (tmp_path / "own.yaml").write_text(RECIPE + f"teacher_data: {json.dumps(view)}\n")
    teacher = ["--teacher", "timm/test_resnet", "--teacher-checkpoint", str(tmp_path / "teacher.pt")]
    base = ["--recipe", str(tmp_path / "own.yaml"), "--data-root", str(places / "photos"), "--methods", "kd", *teacher]
    outcome = call(*base, "--output", str(tmp_path / "own"))
    assert outcome.code == 0, outcome.err
    found = identities(tmp_path / "own")["kd"]
    (manifest,) = (tmp_path / "own" / "teachers").glob("*/manifest.json")
    stored = json.loads(manifest.read_text())
    assert stored["identity"]["view"] == {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [160, 160]}
    data = load_dataset("folder", root=places / "photos", crop=16, workers=0)
    own = as_view(stored["identity"]["view"], data.spec)
    network.eval()
    with torch.no_grad():
        batches = list(data.eval_loader(6).epoch(0))
        losses = [torch.nn.functional.cross_entropy(network(own(b.images)), b.targets) for b in batches]
    assert stored["loss"] == pytest.approx(float(losses[0]), rel=1e-4)
    outcome = call(*base, "--teacher_data.mean", "[0.4, 0.4, 0.4]", "--output", str(tmp_path / "other"))
    assert outcome.code == 0, outcome.err
    assert identities(tmp_path / "other")["kd"]["teacher"] != found["teacher"]


def test_a_teacher_that_is_trained_here_sees_what_it_was_trained_on(places: Path) -> None:
    values = load_recipe(places / "tiny.yaml").as_dict()
    images = load_dataset("folder", root=places / "photos", crop=16, workers=0)
    plans = [
        make_plan(make_recipe({**values, "teacher_data": view}), load_table("digits"), lambda _: images)
        for view in ({}, {"mean": [0.1, 0.1, 0.1]})
    ]
    assert list(plans[0].runs) == list(plans[1].runs)


def test_the_bar_weighs_a_teacher_at_its_own_size(places: Path, tmp_path: Path) -> None:
    name = "timm/vit_tiny_patch16_224"  # runs at no other size
    torch.save(create_model(name, num_classes=3).state_dict(), tmp_path / "vit.pt")
    values = {**load_recipe(places / "tiny.yaml").as_dict(), "pairs": [f"{name}:tinycnn_8"], "methods": ["kd"]}
    recipe = make_recipe({**values, "teacher_data": {"input_size": "declared"}})
    images = load_dataset("folder", root=places / "photos", crop=16, workers=0)
    (group,) = make_plan(recipe, load_table("digits"), lambda _: images, teacher_checkpoint=tmp_path / "vit.pt").groups()
    assert runner._Costs().shared(group) > 100 * runner._Costs().member(group)


def test_views() -> None:
    data = DataSpec(3, (16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    declared = describe_view("timm/test_resnet", {"mean": "declared", "std": "declared", "input_size": [16, 16]})
    assert as_view(declared, data) is None, "it wants what there is"
    assert describe_view("torchvision/resnet18", {"mean": "declared"}) == {}
    assert describe_view("timm/swin_tiny_patch4_window7_224", {"input_size": "declared"}) == {"input_size": [224, 224]}


def test_published_weights_are_named_without_fetching_them() -> None:
    assert published_weights("timm/swin_tiny_patch4_window7_224") == "timm/swin_tiny_patch4_window7_224.ms_in1k"
    assert published_weights("torchvision/resnet18") == "torchvision ResNet18_Weights.IMAGENET1K_V1"
    for name in ("resnet8", "timm/vit_base_patch16_224.augreg_in21k"):
        with pytest.raises(OptionError, match="no published weights"):
            published_weights(name)
    with pytest.raises(UnknownNameError, match="Unknown model 'torchvision/nothing'"):
        published_weights("torchvision/nothing")


def test_a_tag_that_timm_does_not_have_is_refused() -> None:
    for ask in (published_weights, lambda name: describe_view(name, {"mean": "declared"})):
        with pytest.raises(UnknownNameError, match=r"Unknown tag of 'timm/resnet18' 'a1_in'\. Did you mean 'a1_in1k'"):
            ask("timm/resnet18.a1_in")


def test_the_recipe_that_is_shipped_builds_a_plan_of_any_folder(places: Path) -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "distillzoo" / "bench" / "recipes" / "folder.yaml")
    images = load_dataset("folder", root=places / "photos", workers=0)
    plan = make_plan(apply_override(recipe, "student.epochs", 1), load_table("folder"), lambda _: images)
    assert [cell.row.name for cell in plan.cells] == [row.name for row in load_table("folder").rows if not row.extra]
    assert plan.cells[0].run.data.spec.input_size == (224, 224)
