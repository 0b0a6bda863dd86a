from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distillzoo.bench.recipe import Pair, Recipe, apply_override, find_recipe, list_recipes, load_recipe, make_recipe
from distillzoo.errors import DistillZooError, OptionError
from tests.bench.conftest import TINY, TINY_YAML


def test_types_are_checked_and_converted(tiny: Recipe) -> None:
    assert tiny.pairs == ("tinycnn_32:tinycnn_8",)
    assert tiny.seeds == (0, 1)
    assert make_recipe({**TINY, "student": {"lr": 1}}).student.lr == 1.0
    assert make_recipe(tiny.as_dict()) == tiny


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"studnt": {}}, ["'studnt'", "Did you mean 'student'"]),
        ({"student": {"learning_rate": 1}}, ["'learning_rate'", "lr"]),
        ({"student": {"epochs": 1.5}}, ["student.epochs", "expected int", "1.5"]),
        ({"student": {"epochs": 0}}, ["epochs", "at least 1", "0"]),
        ({"student": {"schedule": "stp"}}, ["student.schedule", "'step'", "stp"]),
        ({"split": "val"}, ["split", "'heldout'", "val"]),
        ({"seeds": []}, ["seeds", "empty"]),
        ({"seeds": [1, 1]}, ["seeds", "1 twice"]),
        ({"seeds": [-1]}, ["at least 0", "-1"]),
        ({"pairs": ["resnet20"]}, ["teacher:student", "'resnet20'"]),
        ({"pairs": []}, ["pairs", "empty"]),
        ({"methods": ["kd", "kd"]}, ["methods", "'kd' twice"]),
        ({"student_overrides": {"resnet8": {"lrr": 1}}}, ["student_overrides.resnet8", "'lrr'", "'lr'"]),
        ({"student_overrides": {"resnet8": 3}}, ["student_overrides", "mapping"]),
        ({"data": 3}, ["data", "mapping"]),
    ],
)
def test_wrong_fields_are_refused_in_a_sentence(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        make_recipe({**TINY, **change})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("field", ["name", "dataset", "pairs", "teacher", "student"])
def test_required_fields(field: str) -> None:
    with pytest.raises(OptionError, match=f"lacks the field '{field}'"):
        make_recipe({key: value for key, value in TINY.items() if key != field})


@pytest.mark.parametrize("place", ["data", "options", "weights", "student"])
def test_no_mapping_is_read_as_an_object_to_construct(place: str) -> None:
    evil = {"x": {"class_path": "pathlib.Path", "init_args": {}}}
    with pytest.raises(OptionError, match="would construct an object"):
        make_recipe({**TINY, place: evil})


def test_values_of_free_mappings_stay_what_they_are() -> None:
    recipe = make_recipe({**TINY, "options": {"kd": {"temperature": "2", "x": [1, {"y": "true"}]}}})
    assert recipe.options == {"kd": {"temperature": "2", "x": [1, {"y": "true"}]}}


def test_overrides_by_network_name_and_pattern() -> None:
    overrides = {"mobile*": {"lr": 0.01}, "mobilenetv2": {"epochs": 7}}
    recipe = make_recipe({**TINY, "student_overrides": overrides, "teacher_overrides": {"vgg*": {"lr": 0.2}}})
    assert recipe.student_config("mobilenetv2").lr == 0.01
    assert recipe.student_config("mobilenetv2").epochs == 7
    assert recipe.student_config("resnet8") == recipe.student
    assert recipe.teacher_config("vgg13").lr == 0.2
    assert recipe.teacher_config("mobilenetv2") == recipe.teacher


def test_dotted_overrides() -> None:
    recipe = make_recipe({**TINY, "student_overrides": {"resnet8": {"lr": 0.01, "epochs": 9}}})
    changed = apply_override(recipe, "student.lr", 0.3)
    assert changed.student.lr == 0.3
    assert changed.student_config("resnet8").lr == 0.3, "what is set by hand holds for every network"
    assert changed.student_config("resnet8").epochs == 9
    assert changed.changed == ("student.lr",)
    assert recipe.student.lr == 0.05
    assert apply_override(recipe, "data.num_train", 30).data["num_train"] == 30
    assert apply_override(recipe, "options.kd.temperature", 2).options == {"kd": {"temperature": 2}}


def test_a_recipe_from_a_file_keeps_what_the_file_has(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(TINY_YAML + "original: {student: {epochs: 99}}\n")
    recipe = load_recipe(tmp_path / "mine.yaml")
    changed = apply_override(apply_override(recipe, "student.epochs", 7), "student.epochs", 9)
    assert changed.student.epochs == 9
    assert changed.original["student"]["epochs"] == 3
    assert changed.original == recipe.original


@pytest.mark.parametrize(
    "path", ["student.lrr", "studnt.lr", "student", "student.lr.x", "seeds.x", "changed", "name", "original.name"]
)
def test_unknown_override_paths(path: str, tiny: Recipe) -> None:
    with pytest.raises(DistillZooError):
        apply_override(tiny, path, 1)


def test_pair() -> None:
    assert Pair.parse(" a : b ") == Pair("a", "b")
    assert str(Pair("a", "b")) == "a:b"
    for wrong in ("a", "a:b:c", ":b", ""):
        with pytest.raises(OptionError, match="teacher:student"):
            Pair.parse(wrong)


def test_every_built_in_recipe_loads_under_its_file_name() -> None:
    for name in list_recipes():
        assert load_recipe(find_recipe(name, None)).name == name


def test_the_published_protocol() -> None:
    recipe = load_recipe(find_recipe("paper", "cifar100"))
    assert recipe.comparable
    for config in (recipe.student_config("resnet8"), recipe.teacher_config("vgg13")):
        assert (config.epochs, config.batch_size, config.lr, config.weight_decay) == (240, 64, 0.05, 5e-4)
        assert (config.schedule, config.milestones, config.gamma, config.nesterov) == ("step", (150, 180, 210), 0.1, False)
    for student in ("mobilenetv2", "shufflenetv1", "shufflenetv2"):
        assert recipe.student_config(student).lr == 0.01
    assert "resnet32x4:shufflenetv1" in recipe.pairs


def test_fast_and_cpu_recipes_are_not_the_published_protocol() -> None:
    fast, cpu = (load_recipe(find_recipe(name, "cifar100")) for name in ("fast", "cpu"))
    assert (fast.student.epochs, fast.student.batch_size, fast.student.schedule) == (60, 256, "onecycle")
    assert (cpu.student.epochs, cpu.teacher.epochs, cpu.student.batch_size) == (8, 15, 128)
    assert (cpu.student.schedule, cpu.student.precision, cpu.pairs) == ("onecycle", "float32", ("resnet20:resnet8",))
    assert not fast.comparable
    assert not cpu.comparable


def test_recipes_are_found_by_data_set() -> None:
    assert find_recipe(None, None).stem == "digits"
    assert find_recipe(None, "cifar100").stem == "cifar100_paper"
    assert find_recipe("cpu", "cifar100").stem == "cifar100_cpu"
    assert find_recipe("cifar100_cpu", None).stem == "cifar100_cpu"
    assert find_recipe("cifar100_cpu", "cifar100").stem == "cifar100_cpu"


@pytest.mark.parametrize(
    ("name", "dataset", "words"),
    [
        ("cpu", None, "pass --dataset cifar100"),
        ("paprika", "cifar100", "cifar100_paper"),
        (None, "cifar10", "Did you mean 'cifar100'"),
        (None, "nonsense", "Unknown data set"),
        ("no/such.yaml", None, "does not exist"),
        ("digts", None, "Unknown recipe 'digts'. Did you mean 'digits'"),
    ],
)
def test_recipes_that_are_not_found(name: str | None, dataset: str | None, words: str) -> None:
    with pytest.raises(DistillZooError, match=words):
        find_recipe(name, dataset)


def test_a_changed_copy_of_a_built_in_recipe_needs_a_name_of_its_own(tmp_path: Path) -> None:
    text = find_recipe("paper", "cifar100").read_text()
    (tmp_path / "same.yaml").write_text(text)
    assert load_recipe(tmp_path / "same.yaml").comparable
    (tmp_path / "mine.yaml").write_text(text.replace("epochs: 240", "epochs: 60"))
    with pytest.raises(OptionError, match=r"'mine\.yaml' has the name of a built-in recipe, 'cifar100_paper', and other fields"):
        load_recipe(tmp_path / "mine.yaml")


def test_what_decides_the_images_is_told_from_how_they_are_read() -> None:
    recipe = make_recipe({**TINY, "dataset": "imagenet100", "data": {"crop": 160, "workers": 3, "class_list": "lists/mine.txt"}})
    assert recipe.data_options == {
        "class_list": "mine.txt",
        "allow_missing_classes": False,
        "crop": 160,
        "resize": None,
        "mean": None,
        "std": None,
        "packed": False,
    }
    default = make_recipe({**TINY, "dataset": "imagenet100", "data": {}}).data_options
    assert make_recipe({**TINY, "dataset": "imagenet100", "data": {"class_list": "cmc"}}).data_options == default
