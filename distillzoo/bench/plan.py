"""Pairs x rows x seeds become runs with ids, and runs become groups that train together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distillzoo.bench.recipe import Pair, Recipe
from distillzoo.bench.records import content_id
from distillzoo.bench.rows import Row, TableSpec, select_rows
from distillzoo.bench.views import describe_view, published_weights
from distillzoo.data import DataSet
from distillzoo.data.packing import file_sha256
from distillzoo.engine import TrainConfig
from distillzoo.errors import OptionError

__all__ = ["RESULTS_VERSION", "Cell", "Group", "Plan", "Run", "TeacherJob", "make_plan"]

RESULTS_VERSION = 1
"""Raised when a change of the code changes results; every older record then counts as another run."""


@dataclass(frozen=True)
class TeacherJob:
    """A teacher that must be there before its students train.

    Args:
        id: Id of its record.
        identity: What the id hashes.
        name: Name of the network.
        seed: Seed of its training.
        config: How it is trained.
        data: What it is trained on.
        checkpoint: File that the user gave; it then is imported, not trained.
        sliced: Whether its head is cut out of that of a network of ImageNet's 1,000 classes.
        view: What an imported teacher wants to see, as :func:`~distillzoo.bench.views.describe_view` returns it.
    """

    id: str
    identity: dict[str, Any] = field(repr=False)
    name: str
    seed: int
    config: TrainConfig
    data: DataSet = field(repr=False)
    checkpoint: Path | None = None
    sliced: bool = False
    view: dict[str, list[float]] = field(default_factory=dict, repr=False)

    @property
    def imported(self) -> bool:
        """Whether its weights come from elsewhere: from a file, or from where the network comes from."""
        return self.checkpoint is not None or self.sliced


@dataclass(frozen=True)
class Run:
    """One student, one method, one seed: one record.

    Args:
        id: Id of its record.
        identity: What the id hashes.
        row: The row that it belongs to.
        pair: The networks.
        seed: The seed.
        config: How it is trained.
        data: What it is trained on.
        teacher: Its teacher; ``None`` if the method reads none.
        taps: Tap paths by network name, in place of those that are found.
        data_options: Options of the data set that decide what is trained on: for whoever has the records and not the images.
    """

    id: str
    identity: dict[str, Any] = field(repr=False)
    row: Row
    pair: Pair
    seed: int
    config: TrainConfig
    data: DataSet = field(repr=False)
    teacher: TeacherJob | None
    taps: dict[str, list[str]] = field(default_factory=dict, repr=False)
    data_options: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Group:
    """Runs that train together: same networks, seed, data and training configuration; one teacher pass serves all.

    Args:
        pair: The networks.
        seed: The seed.
        config: How they are trained.
        runs: The members.
    """

    pair: Pair
    seed: int
    config: TrainConfig
    runs: tuple[Run, ...]

    @property
    def teacher(self) -> TeacherJob | None:
        """The teacher, if any member reads one."""
        return next((run.teacher for run in self.runs if run.teacher is not None), None)

    @property
    def data(self) -> DataSet:
        """What they are trained on."""
        return self.runs[0].data

    @property
    def taps(self) -> dict[str, list[str]]:
        """Tap paths by network name."""
        return self.runs[0].taps


@dataclass(frozen=True)
class Cell:
    """Where a run stands in the table.

    Args:
        pair: The block.
        row: The row.
        seed: The seed.
        run: The run.
        teacher: The teacher of the block, whether the row reads it or not.
    """

    pair: Pair
    row: Row
    seed: int
    run: Run
    teacher: TeacherJob


@dataclass(frozen=True)
class Plan:
    """Everything that a table needs.

    Args:
        recipe: What was asked for.
        table: The table file.
        cells: Every number of the table.
    """

    recipe: Recipe
    table: TableSpec
    cells: tuple[Cell, ...]

    @property
    def runs(self) -> dict[str, Run]:
        """Every run once, by id, in order."""
        return {cell.run.id: cell.run for cell in self.cells}

    def groups(self, finished: Iterable[str] = ()) -> list[Group]:
        """Return the groups of the runs that are not finished; a run that stands in several pairs trains once."""
        done = set(finished)
        members: dict[tuple[Pair, str, int, TrainConfig], dict[str, Run]] = {}
        for cell in self.cells:
            if cell.run.id not in done:
                done.add(cell.run.id)
                members.setdefault((cell.pair, cell.teacher.id, cell.seed, cell.run.config), {})[cell.run.id] = cell.run
        return [Group(pair, seed, config, tuple(runs.values())) for (pair, _, seed, config), runs in members.items()]


def make_plan(
    recipe: Recipe,
    table: TableSpec,
    load: Callable[[Recipe], DataSet],
    *,
    teacher_checkpoint: Path | None = None,
    points: Sequence[tuple[Recipe, Sequence[Row]]] | None = None,
) -> Plan:
    """Lay out pairs x rows x seeds.

    Args:
        recipe: What to run.
        table: The table file.
        load: Returns the data set of a recipe; called for every point.
        teacher_checkpoint: The teacher's weights, in place of training it.
        points: Of a sweep: recipes with their rows; ``None`` takes the recipe's rows once.
    Raises:
        OptionError: If a row's option does not exist, or one checkpoint is given for several teachers.
    """
    pairs = [Pair.parse(text) for text in recipe.pairs]
    if teacher_checkpoint is not None and len({pair.teacher for pair in pairs}) > 1:
        raise OptionError("--teacher-checkpoint is one teacher's weights, but the pairs name several; choose one with --pairs.")
    cells: list[Cell] = []
    for point, rows in points if points is not None else [(recipe, select_rows(table, recipe))]:
        data = load(point)
        for pair in pairs:
            teacher = _teacher_job(point, pair.teacher, data, teacher_checkpoint)
            for seed in point.seeds:
                cells += [Cell(pair, row, seed, _run(point, row, pair, seed, teacher), teacher) for row in rows]
    _check_told_apart(cells)
    return Plan(recipe, table, tuple(cells))


def _check_told_apart(cells: Sequence[Cell]) -> None:
    """Refuse points of a sweep that are one and the same run: what is swept decides nothing there.

    Only the row that reads no teacher may stand level where the teacher's training is swept.
    """
    seen: dict[tuple[Pair, str, str], Cell] = {}
    for cell in cells:
        other = seen.setdefault((cell.pair, cell.row.name, cell.run.id), cell)
        one, two = dict(other.row.point), dict(cell.row.point)
        swept = [path for path in one | two if one.get(path) != two.get(path)]
        if swept and not (cell.run.teacher is None and all(path.startswith("teacher") for path in swept)):
            first, second = (", ".join(f"{path}={value}" for path, value in one.row.point) for one in (other, cell))
            raise OptionError(
                f"{first} and {second} make one and the same run of {cell.row.title} on {cell.pair}, which a sweep would show as "
                "two; sweep what decides the run (a teacher that is not trained here has no training), or leave that row out."
            )


def _data_identity(data: DataSet) -> dict[str, Any]:
    return {"name": data.name, "digest": data.digest, "split": data.split, "augment": repr(data.augment)}


def _teacher_job(recipe: Recipe, name: str, data: DataSet, checkpoint: Path | None) -> TeacherJob:
    config = recipe.teacher_config(name)
    view: dict[str, list[float]] = {}
    identity: dict[str, Any] = {
        "results_version": RESULTS_VERSION,
        "kind": "teacher",
        "data": _data_identity(data),
        "network": name,
        "seed": recipe.teacher_seed,
        "config": asdict(config),
        "storage": recipe.teacher_storage,
    }
    if checkpoint is not None and not checkpoint.is_file():
        fault = "is a folder" if checkpoint.is_dir() else "does not exist"
        raise OptionError(f"The teacher checkpoint {str(checkpoint)!r} {fault}; name a .safetensors or .pt file.")
    sliced = recipe.teacher_head == "slice"
    if checkpoint is not None or sliced:  # a teacher that is trained here sees what it was trained on
        identity = {key: identity[key] for key in ("results_version", "kind", "data", "network")}
        source = {"weights": published_weights(name)} if checkpoint is None else {"checkpoint": file_sha256(checkpoint)}
        view = describe_view(name, recipe.teacher_data)
        identity |= {**source, **({"head": "slice"} if sliced else {}), **({"view": view} if view else {})}
    return TeacherJob(content_id(identity), identity, name, recipe.teacher_seed, config, data, checkpoint, sliced, view)


def _run(recipe: Recipe, row: Row, pair: Pair, seed: int, teacher: TeacherJob) -> Run:
    config = recipe.student_config(pair.student)
    own_teacher = teacher if row.needs_teacher(pair) else None
    identity: dict[str, Any] = {
        "results_version": RESULTS_VERSION,
        "kind": "student",
        "data": _data_identity(teacher.data),
        "teacher": None if own_teacher is None else own_teacher.id,
        "student": pair.student,
        "method": row.method,
        **row.describe(pair),
        "seed": seed,
        "config": asdict(config),
    }
    taps = {
        who: recipe.taps[name]
        for who, name in (("teacher", pair.teacher), ("student", pair.student))
        if name in recipe.taps and (who == "student" or own_teacher is not None)
    }
    if taps:
        identity["taps"] = taps
    return Run(content_id(identity), identity, row, pair, seed, config, teacher.data, own_teacher, recipe.taps, recipe.data_options)
