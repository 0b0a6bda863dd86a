"""What is run: data, pairs, rows, seeds and how they train, as one frozen record that is read from YAML."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, Literal

from distillzoo.bench.checks import check_keys, check_list, plain, refuse_objects, typed_fields
from distillzoo.bench.views import check_teacher_data
from distillzoo.bench.yamls import read_yaml
from distillzoo.data import DATASETS
from distillzoo.engine import TrainConfig
from distillzoo.errors import OptionError, UnknownNameError, unknown_name

__all__ = ["Pair", "Recipe", "apply_override", "find_recipe", "list_recipes", "load_recipe", "make_recipe"]

_FOLDER = Path(__file__).with_name("recipes")
_MOST_EPOCHS = 100_000  # more is a slip of the finger
_NEUTRAL = ("data.workers", "data.verify", "data.skip_bad")  # how files are read, not what they give: no change of the protocol


@dataclass(frozen=True)
class Pair:
    """A teacher and the student that learns from it.

    Args:
        teacher: Name of the teacher network.
        student: Name of the student network.
    """

    teacher: str
    student: str

    @classmethod
    def parse(cls, text: str) -> Pair:
        """Read ``"teacher:student"``.

        Raises:
            OptionError: If it is not two names.
        """
        parts = [part.strip() for part in text.split(":")]
        if len(parts) != 2 or not all(parts):
            raise OptionError(f"A pair is written teacher:student, as resnet20:resnet8; got {text!r}.")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.teacher}:{self.student}"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the numbers of a table, and nothing else.

    Args:
        name: Name of the recipe, as in captions and file names.
        dataset: Registered data set.
        pairs: ``"teacher:student"``, at least one.
        teacher: How teachers are trained.
        student: How students are trained.
        data: Options of the data set.
        split: What networks are evaluated on: ``"test"``, or ``"heldout"`` for whatever is chosen.
        table: Table file; ``None`` takes that of the data set.
        methods: Row names, registered names or compositions; ``None`` takes the table's rows.
        seeds: Seeds of the students.
        teacher_seed: Seed of the teachers.
        teacher_storage: How a teacher's matrices are kept: every student sees the stored ones.
        teacher_head: ``"own"``: the teacher's head is for the classes of the data; ``"slice"``: it is cut out of that of a network
            of ImageNet's 1,000 classes, from a checkpoint or from where the network comes from.
        teacher_data: What a teacher whose weights come from elsewhere wants to see of the same crop, where that is not what the
            student sees: ``mean``, ``std``, ``input_size``, each in numbers or ``"declared"`` (what timm says of it).
        student_overrides: Training fields by student name or pattern: ``{"mobilenetv2": {"lr": 0.01}}``.
        teacher_overrides: The same by teacher name.
        options: Method options by row name, over the table's.
        weights: Weights by row name, over the table's.
        taps: Tap paths by network name, shallow to deep, in place of those that are found.
        comparable: Whether this is the protocol of the published figures.
        note: A sentence for the caption.
        changed: Paths of fields that were overridden; captions name them.
        original: Every field as the recipe's file has it; empty if it was not read from a file.
    Raises:
        OptionError: If a list is empty or has a value twice, or a number is out of range.
    """

    name: str
    dataset: str
    pairs: tuple[str, ...]
    teacher: TrainConfig
    student: TrainConfig
    data: dict[str, Any] = field(default_factory=dict)
    split: Literal["test", "heldout"] = "test"
    table: str | None = None
    methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    teacher_seed: int = 0
    teacher_storage: Literal["float16", "float32"] = "float16"
    teacher_head: Literal["own", "slice"] = "own"
    teacher_data: dict[str, Any] = field(default_factory=dict)
    student_overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    teacher_overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    taps: dict[str, list[str]] = field(default_factory=dict)
    comparable: bool = False
    note: str = ""
    changed: tuple[str, ...] = ()
    original: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if re.fullmatch(r"[A-Za-z0-9_-]+", self.name) is None:  # it names the table's files, which stay in the output folder
            raise OptionError(f"The name of a recipe is letters, digits, '_' and '-'; got {self.name!r}; rename it.")
        for who, config in (("student", self.student), ("teacher", self.teacher)):
            if config.epochs > _MOST_EPOCHS:
                raise OptionError(f"{who}.epochs is at most {_MOST_EPOCHS}; got {config.epochs}; choose fewer.")
        check_list("pairs", self.pairs)
        check_list("seeds", self.seeds)
        if self.methods is not None:
            check_list("methods", self.methods)
        for seed in (*self.seeds, self.teacher_seed):
            if seed < 0:
                raise OptionError(f"A seed must be an integer of at least 0; got {seed}; choose another.")
        check_teacher_data(self.teacher_data)
        for pair in self.pairs:
            Pair.parse(pair)
        for who in ("student", "teacher"):
            for model, values in getattr(self, f"{who}_overrides").items():
                check_keys(values, _CONFIG_FIELDS, f"{who}_overrides.{model}")

    def student_config(self, model: str) -> TrainConfig:
        """Return how a student of this name is trained."""
        return _overridden(self.student, self.student_overrides, model)

    def teacher_config(self, model: str) -> TrainConfig:
        """Return how a teacher of this name is trained."""
        return _overridden(self.teacher, self.teacher_overrides, model)

    @property
    def data_options(self) -> dict[str, Any]:
        """Options of the data set that decide what is trained on, every default filled in; of files the names.

        How files are read is not among them.
        """
        known = inspect.signature(DATASETS[self.dataset]).parameters
        options = {name: given.default for name, given in known.items() if given.default is not given.empty} | self.data
        kept = {key: plain(value) for key, value in options.items() if key not in _SET_APART and f"data.{key}" not in _NEUTRAL}
        return {key: PurePath(value).name if isinstance(value, str) else value for key, value in kept.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, as :func:`make_recipe` takes it."""
        return {key: plain(value) for key, value in asdict(self).items()}


_CONFIG_FIELDS = tuple(item.name for item in fields(TrainConfig))
_RECIPE_FIELDS = tuple(item.name for item in fields(Recipe))
# Never handed to jsonargparse: where the type is Any it would import and construct what a mapping names.
_SET_APART = {"name": "the field dataset", "root": "--data-root", "split": "the field split", "download": "--download"}
_FREE_FIELDS = ("data", "teacher_data", "student_overrides", "teacher_overrides", "options", "weights", "original")


def _overridden(config: TrainConfig, overrides: Mapping[str, Mapping[str, Any]], model: str) -> TrainConfig:
    """Apply every pattern that fits the model, in order."""
    for pattern, values in overrides.items():
        if fnmatchcase(model, pattern):
            config = replace(config, **typed_fields(TrainConfig, {**asdict(config), **values}, "an override")) if values else config
    return config


def make_recipe(values: Mapping[str, Any], source: str = "The recipe") -> Recipe:
    """Build a recipe from plain data; every field is checked against its type.

    Args:
        values: Fields; ``teacher`` and ``student`` are mappings.
        source: Where it comes from, for messages.
    Raises:
        OptionError: If a field is unknown (near matches are listed), missing or wrong.
    """
    check_keys(values, _RECIPE_FIELDS, source[0].lower() + source[1:])
    refuse_objects(values, source)
    for required in ("name", "dataset", "pairs", "teacher", "student"):
        if values.get(required) is None:
            raise OptionError(f"{source} lacks the field {required!r}; it needs name, dataset, pairs, teacher and student.")
    for who in ("teacher", "student"):
        check_keys(values[who], _CONFIG_FIELDS, f"{source[0].lower()}{source[1:]}, {who}")
    free = {key: value for key, value in values.items() if key in _FREE_FIELDS}
    for key, value in free.items():
        if not isinstance(value, Mapping) or any(key.endswith("_overrides") and not isinstance(v, Mapping) for v in value.values()):
            raise OptionError(
                f"The field {key!r} of {source[0].lower()}{source[1:]} must be a mapping of names to values; got {value!r}."
            )
    for key in free.get("data", ()):
        if key in _SET_APART:
            raise OptionError(f"{key!r} is no option under data of {source[0].lower()}{source[1:]}; set it by {_SET_APART[key]}.")
    typed = typed_fields(Recipe, {key: value for key, value in values.items() if key not in free}, "recipe")
    return Recipe(**{**typed, **copy.deepcopy(free)})


def list_recipes() -> list[str]:
    """Return the names of the built-in recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find_recipe(name: str | None, dataset: str | None) -> Path:
    """Return the file of a recipe.

    Args:
        name: A name, which may leave the data set out (``paper``), or a file; ``None`` takes the data set's own or its ``paper``.
        dataset: The data set; ``None`` takes digits, or what the name says.
    Raises:
        UnknownNameError: If there is no such recipe.
        OptionError: If the file does not exist, or the recipe is another data set's.
    """
    if name is not None and (name.endswith((".yaml", ".yml")) or "/" in name):
        if not Path(name).is_file():
            raise OptionError(f"The recipe file {name!r} does not exist; name a YAML file, or one of {', '.join(list_recipes())}.")
        return Path(name)
    if dataset is not None and dataset not in DATASETS:
        raise UnknownNameError(unknown_name("data set", dataset, DATASETS.names()))
    wanted = dataset or "digits"
    names = list_recipes()
    candidates = [wanted, f"{wanted}_paper"] if name is None else [f"{wanted}_{name}"]
    if name is not None and (dataset is None or name == dataset or name.startswith(f"{dataset}_")):
        candidates.append(name)
    for candidate in candidates:
        if candidate in names:
            return _FOLDER / f"{candidate}.yaml"
    others = [known for known in names if name is not None and known.endswith(f"_{name}")]
    if others:
        raise UnknownNameError(
            f"The data set {wanted!r} has no recipe {name!r}; pass --dataset {others[0].removesuffix(f'_{name}')} with it."
        )
    if name in names:
        raise OptionError(f"The recipe {name!r} is for another data set than {wanted}; leave --dataset or --recipe out.")
    if name is None:
        raise OptionError(
            f"The data set {wanted!r} has no recipe of its own; pass --recipe FILE, a YAML file like the built-in ones."
        )
    raise UnknownNameError(unknown_name("recipe", name, names, listed="There are"))


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        OptionError: If it is not valid, or another recipe under a built-in one's name.
    """
    recipe = make_recipe(read_yaml(path), f"The recipe {path.stem!r}")
    own = _FOLDER / f"{recipe.name}.yaml"
    if own.is_file() and path.resolve() != own.resolve() and recipe != make_recipe(read_yaml(own)):
        raise OptionError(
            f"The recipe file {path.name!r} has the name of a built-in recipe, {recipe.name!r}, and other fields than it, so that "
            "captions would call it by a protocol that it is not; give it a name of its own."
        )
    return replace(recipe, original=replace(recipe, original={}).as_dict())


def apply_override(recipe: Recipe, path: str, value: Any) -> Recipe:
    """Set one field by its dotted path: ``student.lr``, ``data.labels_per_class``, ``split``, ``options.kd.temperature``.

    A training field that is set so holds for every network: overrides by network name give way.

    Raises:
        OptionError: If there is no such field, or the value is wrong.
    """
    first, *rest = path.split(".")
    if first not in _RECIPE_FIELDS or first in ("name", "dataset", "changed", "comparable", "original"):
        raise OptionError(unknown_name("recipe field", first, _RECIPE_FIELDS, listed="Its fields are"))
    values = recipe.as_dict()
    if first in ("student", "teacher"):
        if len(rest) != 1 or rest[0] not in _CONFIG_FIELDS:
            raise OptionError(unknown_name(f"field of {first}", ".".join(rest), _CONFIG_FIELDS, listed="Its fields are"))
        for model in values[f"{first}_overrides"].values():
            model.pop(rest[0], None)
    if rest and not isinstance(values[first], dict):
        raise OptionError(f"The recipe field {first!r} has no parts; set it as --{first} VALUE, not {path!r}.")
    place = values
    for key in (first, *rest)[:-1]:
        place = place.setdefault(key, {})
    place[rest[-1] if rest else first] = value
    if path not in _NEUTRAL and first not in ("table", "methods", "pairs", "seeds", "note"):  # it decides how one trains
        values["changed"] = [*dict.fromkeys([*values["changed"], path])]
    return make_recipe(values)
