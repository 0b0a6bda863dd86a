"""The command line of ``benchmarks/run_table.py``."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distillzoo.bench.environment import check_commit
from distillzoo.bench.lock import folder_lock
from distillzoo.bench.networks import check_networks, pick_device
from distillzoo.bench.options import Options, parse_options
from distillzoo.bench.plan import Plan, make_plan
from distillzoo.bench.plot import plot_sweep, plot_table
from distillzoo.bench.progress import Console
from distillzoo.bench.recipe import Recipe, list_recipes
from distillzoo.bench.recorded import recorded_data, several_sets, unused_records
from distillzoo.bench.records import RecordStore, atomic, canonical_json
from distillzoo.bench.rows import list_tables, load_table, select_rows
from distillzoo.bench.runner import SerialRunner, check_groups
from distillzoo.bench.series import DONE, FAILED, exit_code
from distillzoo.bench.sweep import SweepView, sweep_points, sweep_rows
from distillzoo.bench.table import Table, make_table
from distillzoo.bench.teachers import TeacherStore
from distillzoo.build import list_distillers
from distillzoo.data import DATASETS, DataSet, load_dataset
from distillzoo.errors import DataError, MissingDependencyError, OptionError
from distillzoo.models import MODELS

__all__ = ["Command", "main"]


def main(arguments: Sequence[str], *, teacher_folders: Sequence[Path] = (), console: Console | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: What stands behind the program's name.
        teacher_folders: Folders of teachers that are only read.
        console: What the user sees; ``None`` is standard output and error.
    Returns:
        0 done, 1 a run failed (the others' records stand), 2 wrong input, 130 interrupted, or ``--minutes`` are over.
    """
    console = console or Console()
    with _short_warnings(console):
        return exit_code("run_table.py", lambda: _dispatch(parse_options(arguments), teacher_folders, console), console)


def _dispatch(options: Options, teacher_folders: Sequence[Path], console: Console) -> int:
    if options.action == "list":
        console.say(_listing())
        return DONE
    if options.action == "smoke":
        with tempfile.TemporaryDirectory(prefix="distillzoo-smoke-") as folder:
            return Command(replace(options, output=Path(folder)), (), console).run()
    return Command(options, teacher_folders, console).run()


@contextmanager
def _short_warnings(console: Console) -> Iterator[None]:
    """Show every warning once, as a line, in place of Python's two lines a place."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            console.warn(f"Note: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


class Command:
    """One call of the command line.

    Args:
        options: What was asked for.
        teacher_folders: Folders of teachers that are only read.
        console: What the user sees.
        loaded: Data sets that earlier calls have read, by what they were asked for; new ones are added.
        show: Whether the view is printed and written at the end.
    Attributes:
        plan: What is run.
        results: Finished results by run id.
        reasons: Why runs have no result, by run id, where a method cannot work on a pair.
        view: What the records make at the end.
    """

    def __init__(
        self,
        options: Options,
        teacher_folders: Sequence[Path],
        console: Console,
        loaded: dict[str, DataSet] | None = None,
        *,
        show: bool = True,
    ) -> None:
        if options.recipe is None:
            raise OptionError("There is no recipe to run.")
        self.options = options
        self.console = console
        self.deadline = math.inf if options.minutes is None else time.monotonic() + 60.0 * options.minutes
        self.recipe = options.recipe if not options.axes else sweep_rows(options.axes, options.recipe)
        self.device = pick_device(options.device)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if self.device.type == "cuda":  # float32 means float32: TF32 would be another precision under the same id
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        readonly = options.action in ("dry-run", "table-only")
        self.store = RecordStore(options.output, console.warn, readonly=readonly)
        self.teachers = TeacherStore(self.store, teacher_folders)
        self.show = show
        self._loaded = {} if loaded is None else loaded
        with console.explained("Reading the data: every file is looked at, and its content becomes part of the runs' ids ..."):
            self.plan = self._plan()
        self.results: dict[str, dict[str, Any]] = {}
        self.reasons: dict[str, str] = {}
        self.view: Table | SweepView | None = None
        self._held = ExitStack()
        self._locked = False

    def _plan(self) -> Plan:
        table = load_table(self.recipe.table or self.recipe.dataset)
        points = sweep_points(self.options.axes, table, self.recipe) if self.options.axes else None
        if points is None:
            select_rows(table, self.recipe)  # before data is read: a wrong name should not cost half a minute
        check_networks(self.recipe)
        checkpoint = self.options.teacher_checkpoint
        return make_plan(self.recipe, table, self._load, teacher_checkpoint=checkpoint, points=points)

    def _load(self, recipe: Recipe) -> DataSet:
        options = self.options
        try:
            return self._load_images(recipe)
        except (DataError, OptionError) as error:
            if options.data_root is not None and isinstance(error, OptionError):
                raise
            if options.action != "table-only":
                raise
            found = recorded_data(options.output, recipe)
            if found is not None:
                return found
            several = several_sets(options.output, recipe)
            if several:
                raise DataError(f"{error} {several}") from error
            raise

    def _load_images(self, recipe: Recipe) -> DataSet:
        options = self.options
        key = canonical_json([recipe.dataset, str(options.data_root), recipe.split, recipe.data])
        if key not in self._loaded:
            self._loaded[key] = load_dataset(
                recipe.dataset, root=options.data_root, split=recipe.split, download=options.download, **recipe.data
            )
        return self._loaded[key]

    def run(self) -> int:
        """Do what was asked for and return the exit code."""
        with ExitStack() as self._held:
            if self.options.action in ("run", "smoke") and self.options.output.is_dir():
                self._hold()
            return self._run()

    def _hold(self) -> None:
        """Make sure that the output folder can be written to, and hold it until the end; doing so again does nothing."""
        check_commit()
        self.store.check_writable()
        if not self._locked:
            self._held.enter_context(folder_lock(self.options.output))
            self._locked = True

    def _run(self) -> int:
        self.results = self.store.results(self.plan.runs)
        groups = self.plan.groups(self.results)
        failed = False
        action = self.options.action
        if action == "table-only" and not self.options.output.is_dir():
            self.console.warn(
                f"There are no records in {str(self.options.output)!r}; name the folder with --output, or run without --table-only."
            )
        if action != "table-only":
            jobs = {cell.teacher.id: cell.teacher for cell in self.plan.cells}  # also one that no row reads: a wrong file is wrong
            for job in jobs.values():
                if job.imported and self.teachers.find(job) is None:
                    self.teachers.check_import(job, fetch=action != "dry-run")
        if groups and action != "table-only":
            groups, self.reasons = check_groups(groups, lenient=self.recipe.methods in (None, ("all",)))
            if action == "dry-run":
                from distillzoo.bench.dryrun import estimate

                text, whole = estimate(self.plan, groups, self.teachers, self.device, self.console.warn)
                self.console.say(text)
                return DONE if whole else FAILED
            self._hold()
            for run_id, reason in self.reasons.items():
                self.store.refuse(run_id, self.plan.runs[run_id].identity, reason)
            runner = SerialRunner(self.plan, self.store, self.teachers, self.device, self.console, self.deadline)
            failed = not runner.run(groups)
            self.results = self.store.results(self.plan.runs)
        if action == "dry-run":
            self.console.say("Nothing is left to run: every record is there.")
            return DONE
        if action == "table-only":
            self.reasons = self.store.refusals(self.plan.runs.keys() - self.results.keys())
            unused = unused_records(self.options.output, self.plan) if self.show else ""  # series keep several tables in one folder
            if unused:
                self.console.warn(f"Note: {unused}")
        if self.options.axes:
            self.view = SweepView(self.plan, self.options.axes, self.results)
        else:
            self.view = make_table(self.plan, self.results, lambda job: self.teachers.describe(job, self.results), self.reasons)
        if self.show:
            self._show(self.view)
        diverged = any(result.get("status") != "done" for result in self.results.values())
        return FAILED if failed or diverged else DONE

    def _show(self, view: Table | SweepView) -> None:
        self.console.say("\n" + view.text() + "\n")
        if self.options.action != "smoke" and self.options.output.is_dir():
            axes = [axis.path.replace(".", "-") for axis in self.options.axes]
            self._write(view, self.options.output, "_".join(["sweep", self.recipe.name, *axes] if axes else [self.recipe.name]))

    def _write(self, view: Table | SweepView, folder: Path, name: str) -> None:
        texts: dict[str, Callable[[], str]] = {"md": view.markdown, "csv": view.csv}
        try:
            for ending, text in texts.items():
                with atomic(folder / f"{name}.{ending}") as handle:
                    handle.write(text().encode())
            if isinstance(view, Table):
                plot_table(view, folder / f"{name}.png")
            else:
                plot_sweep(view.title, *view.series(), folder / f"{name}.png")
        except OSError as error:
            self.console.warn(f"The table's files could not be written to {str(folder)!r} ({error.strerror}).")
            return
        except MissingDependencyError as error:
            self.console.warn(f"The plot was not written: {error}")
            self.console.say(f"Written: {folder / name}.md, .csv; records in {folder}.")
            return
        self.console.say(f"Written: {folder / name}.md, .csv, .png; records in {folder}.")


def _listing() -> str:
    parts = {
        "Methods": list_distillers(),
        "Data sets": DATASETS.names(),
        "Recipes": list_recipes(),
        **{f"Rows of the table {name}": [row.name for row in load_table(name).rows] for name in list_tables()},
        "Networks (timm/... and torchvision/... besides)": MODELS.names(),
    }
    return "\n".join(f"{title}: {', '.join(names)}" for title, names in parts.items())
