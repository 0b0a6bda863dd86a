"""ImageNet's layout through the command line: class lists in records and captions, sliced teachers, the whole table."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distillzoo.bench.plan import make_plan
from distillzoo.bench.recipe import Pair, apply_override, load_recipe
from distillzoo.bench.rows import load_table
from distillzoo.bench.table import make_table
from distillzoo.data import find_class_list, imagenet_rows, imagenet_wnids, load_dataset
from distillzoo.models import MODELS, create_model
from tests.bench.conftest import Call, Stop, records
from tests.data.pictures import fill

WNIDS = ("n01443537", "n02107142", "n01440764")
RECIPES = Path(__file__).parents[2] / "distillzoo" / "bench" / "recipes"
RECIPE = """
name: tiny
dataset: imagenet100
pairs: [timm/test_resnet:tinycnn_8]
table: digits
methods: [vanilla, kd]
seeds: [0]
data: {crop: 16, workers: 0}
teacher_head: slice
teacher_data: {mean: declared, std: declared, input_size: [32, 32]}
teacher: {epochs: 1, batch_size: 8, lr: 0.05, schedule: onecycle}
student: {epochs: 2, batch_size: 8, lr: 0.05, schedule: onecycle}
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with one class too many, a class list, a recipe and a teacher of 1,000 classes."""
    root = tmp_path_factory.mktemp("imagenet")
    for part, number in (("train", 4), ("val", 2)):
        fill(root / "copy" / part, number, (*WNIDS, "n13037406"), first=1000 * number)
    (root / "three.txt").write_text("\n".join(WNIDS))
    (root / "tiny.yaml").write_text(RECIPE)
    torch.manual_seed(0)
    torch.save(create_model("timm/test_resnet", num_classes=1000).state_dict(), root / "teacher.pt")
    return root


def arguments(places: Path, output: Path, *more: str, teacher: str | None = "teacher.pt", listed: str = "three.txt") -> list[str]:
    weights = [] if teacher is None else ["--teacher-checkpoint", str(places / teacher)]
    where = ["--recipe", str(places / "tiny.yaml"), "--data-root", str(places / "copy"), "--output", str(output)]
    return [*where, "--class-list", str(places / listed) if listed.endswith(".txt") else listed, *weights, *more]


def result(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_class_list_is_in_every_record_and_caption(places: Path, call: Call, tmp_path: Path) -> None:
    outcome = call(*arguments(places, tmp_path))
    assert outcome.code == 0, outcome.err
    chosen = find_class_list(places / "three.txt")
    listed = f"ImageNet, class list three.txt, 3 classes, labels as listed, digest {chosen.digest}, 12 training and 6 test images"
    assert outcome.out.count(listed) == 2, "the teacher's line and the caption"
    found = [result(folder / "result.json") for folder in records(tmp_path).values()]
    found += [result(path) for path in tmp_path.glob("teachers/*/manifest.json")]
    assert len(found) == 3
    for each in found:
        assert each["class_list"] == {"name": "three.txt", "order": "as listed", "digest": chosen.digest, "wnids": list(WNIDS)}
        assert each["data"] == listed
    again = ["--recipe", str(places / "tiny.yaml"), "--output", str(tmp_path), "--table-only"]
    weights = ["--teacher-checkpoint", str(places / "teacher.pt"), "--class-list", str(places / "three.txt")]
    assert call(*again, *weights).out.strip() in outcome.out


def test_a_sliced_teacher_is_the_whole_one_on_these_classes(places: Path, call: Call, tmp_path: Path) -> None:
    outcome = call(*arguments(places, tmp_path, "--methods", "kd"))
    assert outcome.code == 0, outcome.err
    (path,) = tmp_path.glob("teachers/*/manifest.json")
    stored = result(path)
    assert stored["identity"]["head"] == "slice"
    whole = create_model("timm/test_resnet", num_classes=1000, checkpoint_path=places / "teacher.pt").eval()
    images = load_dataset("imagenet100", root=places / "copy", class_list=places / "three.txt", crop=16, workers=0)
    (batch,) = images.eval_loader(8).epoch(0)
    pixels = batch.images * torch.tensor(images.spec.std).view(-1, 1, 1) + torch.tensor(images.spec.mean).view(-1, 1, 1)
    seen = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear", antialias=True) * 2 - 1
    with torch.no_grad():
        logits = whole(seen)[:, imagenet_rows(WNIDS)]
    assert stored["accuracy"] == pytest.approx(100 * float((logits.argmax(1) == batch.targets).float().mean()))
    assert stored["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, batch.targets)), rel=1e-4)
    line = next(line for line in outcome.out.splitlines() if line.startswith("Teacher"))
    assert f"{stored['accuracy']:.2f} % on ImageNet, class list three.txt" in line
    assert outcome.out.index(line) < outcome.out.index("seed 0: KD"), "measured first"
    heading = f"timm/test_resnet ({stored['accuracy']:.2f} %, head cut to these classes) -> tinycnn_8"
    assert heading in outcome.out
    assert heading.replace("->", "→") in (tmp_path / "tiny.md").read_text()


def test_a_teacher_of_one_size_of_images_alone(places: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OneSize(torch.nn.Sequential):  # as Swin is
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.shape[2:] == (32, 32), "this network reads images of 32x32 only"
            return super().forward(images)

    def one_size(num_classes: int) -> OneSize:
        return OneSize(torch.nn.Conv2d(3, 4, 4, 4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, num_classes))

    monkeypatch.setitem(MODELS._items, "one_size", one_size)
    torch.save(one_size(1000).state_dict(), tmp_path / "one_size.pt")
    more = ["--teacher", "one_size", "--teacher-checkpoint", str(tmp_path / "one_size.pt"), "--methods", "kd"]
    outcome = call(*arguments(places, tmp_path / "runs", *more, teacher=None))
    assert (outcome.code, outcome.err) == (0, "")


def test_the_same_classes_are_the_same_run_whatever_the_copy_holds_besides(places: Path, call: Call, tmp_path: Path) -> None:
    call(*arguments(places, tmp_path))
    shutil.copytree(places / "copy", tmp_path / "alone")
    for part in ("train", "val"):
        shutil.rmtree(tmp_path / "alone" / part / "n13037406")
    shutil.copy(places / "three.txt", tmp_path / "other name.txt")
    more = [*arguments(places, tmp_path), "--table-only"]
    more[more.index("--data-root") + 1] = str(tmp_path / "alone")
    more[more.index("--class-list") + 1] = str(tmp_path / "other name.txt")
    outcome = call(*more)
    assert (outcome.code, outcome.out.count("missing")) == (0, 0)


WRONG = [
    ([], {"listed": "cmc"}, "lacks 98 of the 100 classes of the class list 'cmc' (train has 2, val has 2)"),
    ([], {"listed": "cmcc"}, "Unknown class list 'cmcc'. Did you mean 'cmc'"),
    ([], {"listed": "none.txt"}, "Unknown class list"),
    (["--packed"], {}, "no index.json"),
    (["--teacher-head", "own"], {}, "must hold weights of a timm/test_resnet with 3 classes"),
    ([], {"teacher": "own.pt"}, "weights of a timm/test_resnet with 1000 classes (--teacher-head own takes one"),
    (["--teacher", "timm/test_resnett"], {"teacher": None}, "Did you mean 'timm/test_resnet'"),
    (["--teacher", "timm/test_resnett"], {}, "Did you mean 'timm/test_resnet'"),
    ([], {"teacher": "."}, "is a folder; name a .safetensors or .pt file"),
    (["--teacher", "tinycnn_32"], {"teacher": None}, "no published weights of 'tinycnn_32'"),
]


@pytest.mark.parametrize(("more", "changed", "words"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_wrong_input(more: list[str], changed: dict[str, Any], words: str, places: Path, call: Call, tmp_path: Path) -> None:
    torch.save(create_model("timm/test_resnet", num_classes=3).state_dict(), places / "own.pt")
    outcome = call(*arguments(places, tmp_path / "runs", *more, **changed))
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_published_weights_that_cannot_be_had(places: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("timm.create_model", offline)
    outcome = call(*arguments(places, tmp_path / "runs", teacher=None))
    assert outcome.code == 2
    assert "--teacher-head slice: The pretrained weights of 'timm/test_resnet' could not be had" in outcome.err
    assert "give a file of a timm/test_resnet with 1000 classes with --teacher-checkpoint" in outcome.err
    assert not (tmp_path / "runs").exists()


def test_published_weights_are_fetched_for_1000_classes_and_cut(
    places: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    real, asked = timm.create_model, []

    def online(name: str, *, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            asked.append((name, options["num_classes"]))
            return real(name, num_classes=1000, checkpoint_path=str(places / "teacher.pt"))
        return real(name, **options)

    monkeypatch.setattr("timm.create_model", online)
    outcome = call(*arguments(places, tmp_path, "--methods", "kd", teacher=None))
    assert outcome.code == 0, outcome.err
    assert set(asked) == {("test_resnet", 1000)}
    (manifest,) = tmp_path.glob("teachers/*/manifest.json")
    assert result(manifest)["identity"]["weights"] == "timm/test_resnet.r160_in1k"


def test_a_partial_copy_on_request(places: Path, call: Call, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("\n".join((*WNIDS, "n02123045")))
    asked = arguments(places, tmp_path / "runs", "--methods", "vanilla", "--allow-missing-classes")
    asked[asked.index("--class-list") + 1] = str(tmp_path / "more.txt")
    outcome = call(*asked)
    assert outcome.code == 0, outcome.err
    assert "class list more.txt without 1, 3 classes" in outcome.out
    assert "lacks 1 of the 4 classes of the class list 'more.txt', and goes without: n02123045 (tabby" in outcome.err
    assert "with data.class_list more.txt" in outcome.out
    assert "data.allow_missing_classes true and the teacher of the file " in outcome.out
    assert str(tmp_path) not in outcome.out.partition("Written")[0], "a folder is nobody's business"


@pytest.mark.parametrize(("table", "rows"), [("imagenet100", 7), ("imagenet100_pilot", 3)])
def test_the_shipped_recipe_lays_the_table_out(table: str, rows: int, places: Path) -> None:
    recipe = apply_override(load_recipe(RECIPES / "imagenet100.yaml"), "student.precision", "bf16")
    images = load_dataset("imagenet100", root=places / "copy", class_list=places / "three.txt", workers=0)
    plan = make_plan(recipe, load_table(table), lambda _: images)
    assert len(plan.cells) == rows * 5 * 3
    table_of_none = make_table(plan, {}, lambda _: {"accuracy": 93.5, "parameters": 5, "head": "slice"})
    published = ", published 94.48 % (KDiffusion paper), student"
    assert [published in block.caption for block in table_of_none.blocks] == [True] * 5
    lr = {cell.pair.student: cell.run.config.lr for cell in plan.cells}
    assert sorted(lr.values()) == [0.05] * 4 + [0.1]
    assert len({cell.teacher.id for cell in plan.cells}) == 1
    job = plan.cells[0].teacher
    assert (job.imported, job.sliced, job.identity["weights"]) == (True, True, "timm/swin_tiny_patch4_window7_224.ms_in1k")


def test_published_figures_stand_beside_our_rows() -> None:
    recipe, table, pilot = load_recipe(RECIPES / "imagenet100.yaml"), load_table("imagenet100"), load_table("imagenet100_pilot")
    pairs = [Pair.parse(text) for text in recipe.pairs]
    label = "KDiffusion paper"
    figures = {
        row.name: [dict(table.published_figures(row.name, pair)).get(label) for pair in pairs]
        for row in table.rows
        if not row.extra
    }
    assert figures.pop("kd") == [None] * 5, "it is not in the published table"
    assert all(value is not None for values in figures.values() for value in values)
    assert figures["kdiffusion_multi"] == [86.2, 87.88, 86.3, 78.04, 80.68]
    crd = [dict(pilot.published_figures("crd", pair)).get(label) for pair in pairs]
    assert crd == [83.72, None, 84.26, None, 77.88]


def make_imagenet(root: Path) -> Path:
    """A copy of ImageNet as it is: all 1,000 classes; photographs where DISTILLZOO_DATA names some, else made-up pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 2, 9, 8, 3), dtype=np.uint8)
    photos = Path(os.environ.get("DISTILLZOO_DATA", "/nonexistent")) / "photos10"
    for part, number in (("train", 4), ("val", 2)):
        for label, wnid in enumerate(imagenet_wnids()):
            folder = root / part / wnid
            folder.mkdir(parents=True)
            real = sorted((photos / part / wnid).glob("*"))[:number]
            for place, file in enumerate(real):
                shutil.copy(file, folder / f"{wnid}_{place}.JPEG")
            for place in range(0 if real else 2):
                Image.fromarray(pixels[label, place]).resize((72, 80)).save(folder / f"{wnid}_{place}.JPEG")
    return root


@pytest.mark.slow
def test_the_whole_table_on_a_generated_copy(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_imagenet(tmp_path / "ImageNet")
    (tmp_path / "five.txt").write_text("n03888257\nn01440764\nn02102040\nn02979186\nn03000684\n")
    torch.manual_seed(0)
    torch.save(create_model("timm/swin_tiny_patch4_window7_224", num_classes=1000).state_dict(), tmp_path / "swin.pt")
    small = ["--data.crop", "64", "--data.workers", "0", "--student.batch_size", "8", "--epochs", "2", "--seeds", "0"]
    common = ["--dataset", "imagenet100", "--data-root", str(root), "--class-list", str(tmp_path / "five.txt"), *small]
    weights = ["--teacher-checkpoint", str(tmp_path / "swin.pt"), "--output", str(tmp_path / "runs")]
    with monkeypatch.context() as patch:
        Stop(patch, 9)  # seven members: the second has begun its second epoch
        assert call(*common, *weights).code == 130
    assert len(list((tmp_path / "runs").glob("*/last.pt"))) == 7
    outcome = call(*common, *weights)
    assert outcome.code == 0, outcome.err
    print(outcome.out)  # noqa: T201 - the table, with -s
    found = [result(path) for path in (tmp_path / "runs").glob("*/result.json")]
    students = {Pair.parse(text).student for text in load_recipe(RECIPES / "imagenet100.yaml").pairs}
    assert {each["identity"]["student"] for each in found} == students
    assert all(np.isfinite(each["last_loss"]) for each in found)
    missing = outcome.out.count("not applicable")
    assert len(found) + missing == 35
    assert "missing" not in outcome.out
    assert call(*common, *weights, "--table-only").out.strip() in outcome.out


@pytest.mark.slow
def test_photographs_with_a_class_file_of_their_own(call: Call, tmp_path: Path) -> None:
    photos = Path(os.environ.get("DISTILLZOO_DATA", "/nonexistent")) / "photos10"
    if not photos.is_dir():
        pytest.skip("DISTILLZOO_DATA has no photos10")
    (tmp_path / "ten.txt").write_text("\n".join(sorted(path.name for path in (photos / "train").iterdir())))
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("workers: 0", "workers: 1").replace("batch_size: 8", "batch_size: 64"))
    torch.save(create_model("timm/test_resnet", num_classes=1000).state_dict(), tmp_path / "teacher.pt")
    where = ["--recipe", str(tmp_path / "tiny.yaml"), "--data-root", str(photos), "--class-list", str(tmp_path / "ten.txt")]
    outcome = call(*where, "--teacher-checkpoint", str(tmp_path / "teacher.pt"), "--output", str(tmp_path / "runs"))
    assert outcome.code == 0, outcome.err
    assert "class list ten.txt, 10 classes" in outcome.out
    assert "1,500 training and 500 test images" in outcome.out
