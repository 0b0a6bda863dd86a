"""The command line's options: read, checked, and turned into a recipe."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from distillzoo.bench.progress import Console
from distillzoo.bench.recipe import Pair, Recipe, apply_override, find_recipe, load_recipe, make_recipe
from distillzoo.bench.rows import merge_weights
from distillzoo.bench.sweep import RECIPE_SCALARS, Axis, is_recipe_path, parse_axis
from distillzoo.bench.yamls import parse_scalar
from distillzoo.data import CLASS_LISTS, DATASETS
from distillzoo.errors import OptionError, unknown_name

__all__ = ["Options", "parse_options"]

_ALLOWED = {
    "executor": ("serial",),
    "device": ("auto", "cpu", "cuda"),
    "teacher_head": ("own", "slice"),
    "split": ("test", "heldout"),
}
_DOTTED = re.compile(rf"--([A-Za-z_][\w+]*(?:\.[\w+*/-]+)+|{'|'.join(RECIPE_SCALARS)})(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Args:
        recipe: The recipe with everything applied; ``None`` where nothing is run (``--list``).
        axes: What is swept.
        output: Folder of the records.
        data_root: Folder of the data.
        download: Whether missing data may be fetched.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: Threads of torch; ``None`` leaves them.
        minutes: How long to train, to the end of the epoch that is under way then; ``None`` is to the end.
        teacher_checkpoint: The teacher's weights.
        action: ``run``, ``list``, ``dry-run``, ``table-only`` or ``smoke``.
    """

    recipe: Recipe | None
    axes: tuple[Axis, ...]
    output: Path
    data_root: Path | None
    download: bool
    device: str
    threads: int | None
    minutes: float | None
    teacher_checkpoint: Path | None
    action: str


class _Parser(argparse.ArgumentParser):
    """Raises what it refuses, so that the caller writes one sentence."""

    def print_help(self, file: Any = None) -> None:
        if file is None:
            Console().say(self.format_help())  # which ends quietly where its reader has left (| head)
        else:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message[0].upper()}{message[1:]}; see --help.")


def _parser() -> _Parser:
    parser = _Parser(
        prog="run_table.py",
        description="Train what a comparison table lacks, then print the table. The same command again goes on where it stopped.",
        epilog="Recipe fields and method options are set by dotted paths: --student.lr 0.1 --kd.temperature 2 --kd.weights.kd 0.5.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", help=f"{', '.join(DATASETS.names())} (default: digits)")
    add("--data-root", metavar="DIR", help="folder of the data set")
    add("--download", action="store_true", help="fetch a missing data set")
    add("--methods", metavar="a,b", help="rows of the table file, registered names, compositions (crd+kd), or all")
    add("--pairs", metavar="teacher:student,...", help="networks")
    add("--seeds", metavar="0,1,2", help="seeds of the students")
    add("--epochs", metavar="N", help="epochs of the students")
    add("--recipe", metavar="NAME|FILE", help="built-in recipe (digits, paper, fast, cpu) or a YAML file")
    add("--split", metavar="test|heldout", help="what is evaluated on; sweeps take heldout unless told otherwise")
    add("--output", metavar="DIR", default="runs", help="folder of the records (default: runs)")
    add("--device", default="auto", metavar="auto|cpu|cuda", help="where to train")
    add("--threads", metavar="N", help="threads of torch on the CPU")
    add("--minutes", metavar="N", help="stop at the end of an epoch after so long; the same command goes on")
    add("--executor", default="serial", metavar="serial|ray|slurm", help="who runs the groups (ray and slurm come later)")
    add("--table", metavar="NAME|FILE", help="table file: which rows there are")
    add("--teacher", metavar="NAME", help="this network teaches in every pair")
    add("--teacher-checkpoint", metavar="FILE", help="the teacher's weights (.safetensors or .pt), in place of training it")
    add(
        "--teacher-head",
        metavar="slice|own",
        help="slice: cut the head of a network of ImageNet's 1,000 classes to those of the data",
    )
    add(
        "--class-list",
        metavar="NAME|FILE",
        help=f"classes of imagenet100: {', '.join(CLASS_LISTS)}, or a file of WordNet identifiers",
    )
    add(
        "--allow-missing-classes",
        action="store_true",
        help="go on with a copy of ImageNet that lacks classes or images of the list",
    )
    add("--packed", action="store_true", help="the data root is what python -m distillzoo pack has written: another protocol")
    add("--report", action="store_true", help=argparse.SUPPRESS)
    add("--sweep", action="append", metavar="field=v1,v2", default=[], help="METHOD.option, METHOD.weights.TERM or a recipe field")
    add("--list", action="store_true", help="list methods, rows, recipes, data sets and networks")
    add("--dry-run", action="store_true", help="print steps, minutes and memory of every group, measured over ten steps")
    add("--table-only", action="store_true", help="print the table from the records there are")
    add("--smoke", action="store_true", help="step every registered method once on generated images")
    return parser


def parse_options(arguments: Sequence[str]) -> Options:
    """Read the command line.

    Args:
        arguments: What stands behind the program's name.
    Raises:
        DistillZooError: If an option is unknown, not built yet, or has a wrong value.
    """
    parser = _parser()
    arguments, overrides = _take_dotted(list(arguments))
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    given, rest = parser.parse_known_args(arguments)
    names = [argument.split("=", 1)[0] for argument in arguments if argument.startswith("--") and argument[:7] != "--sweep"]
    twice = [name for position, name in enumerate(names) if name in names[:position]]
    if twice:
        raise OptionError(f"{twice[0]} is given twice; give it once.")
    if not given.output.strip():
        raise OptionError("--output is empty; name a folder, as --output runs.")
    if rest:
        raise OptionError(unknown_name("option", rest[0].split("=", 1)[0], known, listed="There are"))
    if given.report:
        raise OptionError("--report is not built yet; leave it out.")
    if given.executor in ("ray", "slurm"):
        raise OptionError(f"--executor {given.executor} is not built yet; use --executor serial.")
    for name, allowed in _ALLOWED.items():
        if getattr(given, name) not in (None, *allowed):
            raise OptionError(unknown_name(name.replace("_", " "), getattr(given, name), allowed, listed="Allowed"))
    actions = [name for name in ("list", "dry-run", "table-only", "smoke") if getattr(given, name.replace("-", "_"))]
    if len(actions) > 1:
        raise OptionError(f"--{actions[0]} and --{actions[1]} exclude each other; keep one of the two.")
    axes = tuple(parse_axis(text) for text in given.sweep)
    action = actions[0] if actions else "run"
    return Options(
        recipe=None if action == "list" else _recipe(given, overrides, axes),
        axes=axes,
        output=Path(given.output),
        data_root=None if given.data_root is None else Path(given.data_root),
        download=given.download,
        device=given.device,
        threads=None if given.threads is None else _integer("--threads", given.threads, 1, 1024),
        minutes=None if given.minutes is None else _minutes(given.minutes),
        teacher_checkpoint=None if given.teacher_checkpoint is None else Path(given.teacher_checkpoint),
        action=action,
    )


def _take_dotted(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Take ``--a.b value`` and ``--a.b=value`` out of the arguments."""
    rest: list[str] = []
    found: list[tuple[str, str]] = []
    position = 0
    while position < len(arguments):
        match = _DOTTED.fullmatch(arguments[position])
        position += 1
        if match is None:
            rest.append(arguments[position - 1])
            continue
        path, value = match.group(1), match.group(2)
        if value is None:
            if position >= len(arguments) or arguments[position].startswith("--"):
                raise OptionError(f"--{path} needs a value; write --{path} VALUE.")
            value = arguments[position]
            position += 1
        if path in {known for known, _ in found}:
            raise OptionError(f"--{path} is given twice; give it once.")
        found.append((path, value))
    return rest, found


def _integer(option: str, text: str, least: int, most: int = 2**31 - 1) -> int:
    try:
        value = int(text)
    except ValueError:
        raise OptionError(f"{option} takes a whole number of at least {least}; got {text!r}; write for example {least}.") from None
    if value > most:
        raise OptionError(f"{option} takes a whole number of at most {most}; got {text}; write for example {least}.")
    if value < least:
        raise OptionError(f"{option} takes a whole number of at least {least}; got {value}; write for example {least}.")
    return value


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise OptionError(f"--minutes takes a number above 0; got {text!r}; write for example 25.")
    return value


def _names(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not text.strip():
        raise OptionError(f"{option} is empty; name at least one, separated by commas.")
    if "" in parts:
        raise OptionError(f"{option} has an empty name in {text!r}; separate names by single commas.")
    return parts


def _recipe(given: argparse.Namespace, overrides: Sequence[tuple[str, str]], axes: Sequence[Axis]) -> Recipe:
    """Load the recipe and apply the options to it, the more special ones last."""
    if given.smoke and (given.dataset or given.recipe):
        raise OptionError("--smoke has a data set and a recipe of its own; leave --dataset and --recipe out.")
    dataset = "synthetic" if given.smoke else given.dataset
    recipe = load_recipe(find_recipe(given.recipe, dataset))
    if dataset is not None and recipe.dataset != dataset:
        raise OptionError(f"The recipe {recipe.name!r} is for {recipe.dataset}, but --dataset is {dataset}; drop one of the two.")
    values: dict[str, Any] = {}
    if given.methods is not None:
        values["methods"] = _names("--methods", given.methods)
    if given.pairs is not None:
        values["pairs"] = _names("--pairs", given.pairs)
    if given.seeds is not None:
        values["seeds"] = [_integer("--seeds", text, 0) for text in _names("--seeds", given.seeds)]
    if given.table is not None:
        values["table"] = given.table
    if given.smoke and "methods" not in values:
        values["methods"] = ["all"]
    if values:
        recipe = make_recipe({**recipe.as_dict(), **values})
    if given.teacher is not None:
        pairs = [str(replace(Pair.parse(pair), teacher=given.teacher)) for pair in recipe.pairs]
        recipe = replace(recipe, pairs=tuple(dict.fromkeys(pairs)))
    if given.epochs is not None:
        recipe = apply_override(recipe, "student.epochs", _integer("--epochs", given.epochs, 1))
    chosen = {
        "teacher_head": None if given.teacher_head == recipe.teacher_head else given.teacher_head,
        "data.class_list": given.class_list,
        "data.allow_missing_classes": given.allow_missing_classes or None,
        "data.packed": given.packed or None,
    }
    for path, value in chosen.items():
        recipe = recipe if value is None else apply_override(recipe, path, value)
    for path, text in overrides:
        recipe = _apply(recipe, path, parse_scalar(text))
    split = given.split or ("heldout" if axes else recipe.split)
    return recipe if split == recipe.split else apply_override(recipe, "split", split)


def _apply(recipe: Recipe, path: str, value: Any) -> Recipe:
    """Set a recipe field, or an option or weight of a method, by its dotted path."""
    first, _, rest = path.partition(".")
    if is_recipe_path(path) or first in ("teacher_data", "student_overrides", "teacher_overrides", "options", "weights", "taps"):
        return apply_override(recipe, path, value)
    if rest != "weights" and not rest.startswith("weights."):
        return apply_override(recipe, f"options.{path}", value)
    weights = dict(recipe.weights)
    present = weights.get(first)
    if rest == "weights":
        weights[first] = merge_weights(present, value)
    elif isinstance(present, str):
        raise OptionError(f"--{path} stands beside the preset {present!r} of --{first}.weights; give the preset or the terms.")
    else:
        weights[first] = {**(present if isinstance(present, dict) else {}), rest.removeprefix("weights."): value}
    return replace(recipe, weights=weights, changed=tuple(dict.fromkeys((*recipe.changed, path))))
