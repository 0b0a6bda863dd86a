"""Exit codes and sentences of the command line, for everything that can be wrong before a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distillzoo.bench.options import parse_options
from distillzoo.models import create_model
from tests.bench.conftest import TINY_YAML, Call

WRONG = [
    (["--methods", "vanila,kd"], "Unknown method 'vanila'. Did you mean 'vanilla'"),
    (["--methods", ""], "--methods is empty"),
    (["--methods", "kd,,at"], "empty name"),
    (["--methods", "kd,kd"], "'kd' twice"),
    (["--pairs", "tinycnn_33:tinycnn_8"], "Unknown model 'tinycnn_33'. Did you mean 'tinycnn_32'"),
    (["--pairs", "tinycnn_32"], "teacher:student"),
    (["--pairs", "tinycnn_32:tinycnn_8,tinycnn_32:tinycnn_8"], "twice"),
    (["--teacher", "resnt20"], "Did you mean 'resnet20'"),
    (["--dataset", "digts"], "Unknown data set 'digts'. Did you mean 'digits'"),
    (["--dataset", "folder"], "needs a data root"),
    (["--dataset", "imagenet100"], "needs a data root"),
    (["--dataset", "cifar100", "--recipe", "cpu"], "--data-root"),
    (["--dataset", "cifar100", "--recipe", "cpu", "--data-root", "/nonexistent/place"], "/nonexistent/place"),
    (["--data-root", "/tmp"], "reads no files"),
    (["--recipe", "digts"], "Unknown recipe 'digts'"),
    (["--table", "digts"], "Unknown table 'digts'"),
    (["--epochs", "0"], "at least 1; got 0"),
    (["--epochs", "1.5"], "got '1.5'"),
    (["--seeds", "0,x"], "got 'x'"),
    (["--seeds", "0,0"], "twice"),
    (["--seeds", "0,00"], "twice"),
    (["--seeds", "-1"], "at least 0"),
    (["--threads", "0"], "--threads"),
    (["--split", "tset"], "Did you mean 'test'"),
    (["--device", "gpu"], "Unknown device 'gpu'"),
    (["--method", "kd"], "Unknown option '--method'. Did you mean '--methods'"),
    (["--epochs"], "expected one argument"),
    (["stray"], "Unknown option 'stray'"),
    (["--student.lr", "abc"], "expected float; got abc"),
    (["--student.lr", "-1"], "lr of the training configuration must be above 0"),
    (["--student.lr", "true"], "expected float; got True"),
    (["--student.epochs", "true"], "expected int"),
    (["--student.lr"], "needs a value"),
    (["--student.lr", "1", "--student.lr", "2"], "given twice"),
    (["--student.lrr", "1"], "Did you mean 'lr'"),
    (["--kd.temperatur", "1"], "Did you mean 'temperature'"),
    (["--kd.temperature", "-1"], "above 0"),
    (["--kd.temperature", "abc"], "The option temperature of kd must be a number; got 'abc'"),
    (["--kd.temperature", "true"], "The option temperature of kd must be a number; got True; the default is 4.0"),
    (["--kd.temperature", "null"], "temperature of kd must be a number; got None"),
    (["--kd.temperature", "nan"], "nan"),
    (["--kd.temperature", "inf"], "inf"),
    (["--kd.weights", "imagnet"], "Did you mean 'imagenet'"),
    (["--kd.weights", "1"], "weights are numbers by term"),
    (["--kd.weights", "imagenet", "--kd.weights.kd", "1"], "the preset or the terms"),
    (["--kd.name", "x"], "'name' is no option of 'kd'"),
    (["--threads", "100000000000"], "at most 1024"),
    (["--epochs", "1000000000"], "at most 100000"),
    (["--dataset", "cifar100", "--recipe", "digits"], "for another data set than cifar100"),
    (["--methods", "all,kd"], "stands alone"),
    (["--methods", "vid+kd+nothing"], "'nothing'"),
    (["--teacher_seed", "-1"], "A seed must be an integer of at least 0; got -1"),
    (["--teacher_seed.x", "1"], "has no parts; set it as --teacher_seed VALUE"),
    (["--teacher_seeds", "1"], "Unknown option '--teacher_seeds'"),
    (["--student_overrides.timm/resnet18.lr", "1"], "Unknown network under student_overrides 'timm/resnet18'"),
    (["--taps.nomodel", "[a]"], "Unknown network under taps 'nomodel'"),
    (["--seeds", "0", "--seeds", "1"], "--seeds is given twice"),
    (["--kd.weights.dk", "1"], "'dk'. Its terms are: ce, kd"),
    (["--kd.weights.kd", "abc"], "finite number"),
    (["--kd.weights.kd", "-1"], "finite number of at least 0; got -1"),
    (["--kd.weights.kd", "true"], "finite number of at least 0; got True"),
    (["--student_overrides.tinycnn_9.lr", "1"], "Unknown network under student_overrides 'tinycnn_9'. Did you mean 'tinycnn_8'"),
    (["--student_overrides.tinycnn_32.lr", "1"], "The students of the pairs are: tinycnn_8"),
    (["--teacher_overrides.tinycnn_8.lr", "1"], "The teachers of the pairs are: tinycnn_32"),
    (["--data.num_trai", "1"], "Did you mean 'num_train'"),
    (["--data.root", "x"], "set it by --data-root"),
    (["--data.split", "heldout"], "set it by the field split"),
    (["--taps.tinycnn_8", "[stage1, stag2]"], "no module 'stag2'; the nearest paths are stage2"),
    (["--taps.tinycnn_32", "[stag1]"], "nearest paths"),
    (["--sweep", "kd.temp=1,2"], "Unknown option of kd 'temp'"),
    (["--sweep", "kd.temperature"], "METHOD.option=v1,v2"),
    (["--executor", "ray"], "not built yet"),
    (["--executor", "srial"], "Unknown executor"),
    (["--report"], "not built yet"),
    (["--packed"], "Unknown option of data set 'synthetic' 'packed'"),
    (["--class-list", "x"], "Unknown option of data set 'synthetic' 'class_list'"),
    (["--allow-missing-classes"], "Unknown option of data set 'synthetic'"),
    (["--teacher-head", "slice"], "no published weights of 'tinycnn_32'"),
    (["--teacher-checkpoint", "missing.pt"], "does not exist"),
    (["--dry-run", "--smoke"], "exclude each other"),
    (["--minutes", "0"], "--minutes takes a number above 0; got '0'"),
    (["--minutes", "soon"], "--minutes takes a number above 0; got 'soon'"),
]


def test_fields_without_parts_and_networks_of_others_are_set_too() -> None:
    arguments = [
        "--dataset",
        "folder",
        "--teacher_seed",
        "3",
        "--teacher_storage=float32",
        "--taps.timm/resnet18",
        "[layer2,layer3]",
    ]
    recipe = parse_options([*arguments, "--student_overrides.timm/test-net_x*.lr", "0.02"]).recipe
    assert recipe is not None
    assert (recipe.teacher_seed, recipe.teacher_storage) == (3, "float32")
    assert recipe.taps == {"timm/resnet18": ["layer2", "layer3"]}
    assert recipe.student_overrides["timm/test-net_x*"] == {"lr": 0.02}
    assert {"teacher_seed", "taps.timm/resnet18"} <= set(recipe.changed)


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_input_is_one_sentence_and_writes_nothing(
    arguments: list[str], words: str, call: Call, recipe_file: str, tmp_path: Path
) -> None:
    output = tmp_path / "runs"
    base = [] if {"--dataset", "--recipe", "--smoke"} & set(arguments) else ["--recipe", recipe_file]
    outcome = call(*base, *arguments, "--output", str(output))
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.err.startswith("run_table.py: ")
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""
    assert not output.exists()


def test_a_table_of_no_records_has_every_cell_missing(call: Call, recipe_file: str, tmp_path: Path) -> None:
    outcome = call("--recipe", recipe_file, "--table-only", "--output", str(tmp_path / "runs"))
    assert outcome.code == 0
    assert "There are no records in" in outcome.err
    assert "missing" in outcome.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent(call: Call, recipe_file: str, tmp_path: Path) -> None:
    outcome = call("--recipe", recipe_file, "--device", "cuda", "--output", str(tmp_path / "runs"))
    assert (outcome.code, (tmp_path / "runs").exists()) == (2, False)
    assert "no usable CUDA device" in outcome.err


RECIPES = {
    "name: a\nname: b\n": "'name' stands twice",
    "name: !!python/object/apply:os.getcwd []\n": "never tags that construct objects",
    "- 1\n": "The recipe 'wrong' must be a mapping of names to values",
    "name: [\n": "not valid YAML",
    "name: a\n": "lacks the field 'dataset'",
    "a: &a [*a]\n": "contains itself",
    "a: " + "[" * 5000 + "]" * 5000: "nested too deeply",
    TINY_YAML.replace("name: tiny", "name: ../../evil"): "letters, digits",
    TINY_YAML + "student_overrides: {tinycnn8: {lr: 1.0}}\n": "Unknown network under student_overrides 'tinycnn8'",
    TINY_YAML.replace("pairs: [tinycnn_32:tinycnn_8]", "pairs: null"): "lacks the field 'pairs'",
    "nam: a\n": "Did you mean 'name'",
}


@pytest.mark.parametrize("text", RECIPES)
def test_wrong_recipe_files(text: str, call: Call, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    outcome = call("--recipe", str(path), "--output", str(tmp_path / "runs"))
    assert outcome.code == 2
    assert RECIPES[text] in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


TABLES = {
    "rows: [kd, at]\n": "must be a mapping of names to fields",
    "rows: {kd: {options: [1]}}\n": "Options of row 'kd'",
    "rows: {kd: {pairs: [1]}}\n": "Pairs of row 'kd'",
    "rows: {kd: {pairs: {a: 1}}}\n": "Pairs, a of row 'kd'",
    "rows: {kd: {}}\nbaseline: nothing\n": "Unknown baseline",
}


@pytest.mark.parametrize("text", TABLES)
def test_wrong_table_files(text: str, call: Call, recipe_file: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    outcome = call("--recipe", recipe_file, "--table", str(path), "--methods", "kd", "--output", str(tmp_path / "runs"))
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert TABLES[text] in outcome.err
    assert not (tmp_path / "runs").exists()


def test_a_table_of_ones_own_has_its_title(call: Call, recipe_file: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("title: Two rows\nrows: {kd: {title: KD}, at: {title: AT}}\n")
    outcome = call("--recipe", recipe_file, "--table", str(path), "--table-only", "--output", str(tmp_path / "runs"))
    assert outcome.out.startswith("\nTwo rows: ")


def test_a_preset_of_weights_and_an_empty_output(call: Call, recipe_file: str, tmp_path: Path) -> None:
    arguments = ["--recipe", recipe_file, "--methods", "kd", "--seeds", "0", "--kd.weights", "imagenet"]
    assert call(*arguments, "--output", str(tmp_path / "runs")).code == 0
    (path,) = (tmp_path / "runs").glob("*/result.json")
    assert json.loads(path.read_text())["identity"]["weights"] == {"ce": 0.5, "kd": 0.5}
    assert "--output is empty" in call(*arguments, "--output", "").err


def test_a_recipe_of_another_data_set(call: Call, recipe_file: str) -> None:
    assert "is for synthetic, but --dataset is digits" in call("--recipe", recipe_file, "--dataset", "digits").err


def test_an_output_folder_that_cannot_be_written(call: Call, recipe_file: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    for place in ("file", "file/below"):
        outcome = call("--recipe", recipe_file, "--output", str(tmp_path / place))
        assert outcome.code == 2
        assert "cannot be written to" in outcome.err
    assert (tmp_path / "file").read_text() == "keep"


@pytest.mark.parametrize(("network", "classes"), [("tinycnn_32", 5), ("tinycnn_8", 3), ("resnet8", 3)])
def test_a_teacher_checkpoint_that_does_not_fit(network: str, classes: int, call: Call, recipe_file: str, tmp_path: Path) -> None:
    torch.save(create_model(network, num_classes=classes).state_dict(), tmp_path / "teacher.pt")
    outcome = call(
        "--recipe", recipe_file, "--teacher-checkpoint", str(tmp_path / "teacher.pt"), "--output", str(tmp_path / "runs")
    )
    assert outcome.code == 2
    assert "weights of a tinycnn_32 with 3 classes" in outcome.err
    assert not (tmp_path / "runs").exists()


def test_a_teacher_checkpoint_that_holds_objects(call: Call, recipe_file: str, tmp_path: Path) -> None:
    torch.save({"model": tmp_path}, tmp_path / "teacher.pt")
    outcome = call(
        "--recipe", recipe_file, "--teacher-checkpoint", str(tmp_path / "teacher.pt"), "--output", str(tmp_path / "runs")
    )
    assert outcome.code == 2
    assert "cannot be read" in outcome.err


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", ["junk", "half", "nan", "empty"])
@pytest.mark.parametrize("methods", ["kd", "vanilla"])
def test_a_teacher_checkpoint_that_is_damaged(
    ending: str, kind: str, methods: str, call: Call, recipe_file: str, tmp_path: Path
) -> None:
    path = tmp_path / f"teacher.{ending}"
    state = create_model("tinycnn_32", num_classes=3).state_dict()
    if kind == "nan":
        next(iter(state.values())).view(-1)[0] = float("nan")
    if ending == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    content = path.read_bytes()
    path.write_bytes({"junk": b"junk", "half": content[: len(content) // 2], "nan": content, "empty": b""}[kind])
    arguments = ["--recipe", recipe_file, "--methods", methods, "--teacher-checkpoint", str(path)]
    outcome = call(*arguments, "--output", str(tmp_path / "runs"))
    assert outcome.code == 2
    assert ("NaN or infinite" if kind == "nan" else "cannot be read") in outcome.err
    assert "weights_only" not in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_list(call: Call) -> None:
    outcome = call("--list")
    assert outcome.code == 0
    for words in ("Methods: ", "kd", "digits", "cifar100_paper", "resnet8x4", "tinycnn_8"):
        assert words in outcome.out


def test_dry_run_measures_and_writes_nothing(call: Call, recipe_file: str, tmp_path: Path) -> None:
    outcome = call("--recipe", recipe_file, "--dry-run", "--output", str(tmp_path / "runs"))
    assert outcome.code == 0
    lines = [line.split() for line in outcome.out.splitlines()]
    assert lines[2][:4] == ["teacher", "tinycnn_32", "1", "4"], "2 epochs of 2 steps"
    assert lines[3][:5] == ["tinycnn_32:tinycnn_8", "seed", "0", "2", "6"], "3 epochs of 2 steps, two members"
    assert float(lines[3][5]) > 0
    assert float(lines[3][7]) > 10, "MiB"
    assert "nothing was written" in outcome.out
    assert outcome.err.count(" hours a seed.") == 1, "said when it is known; the second seed costs the same"
    assert not (tmp_path / "runs").exists()


def test_smoke_steps_every_registered_method(call: Call) -> None:
    from distillzoo import list_distillers

    outcome = call("--smoke")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count(" ± -") >= len(list_distillers())
    assert "missing" not in outcome.out
