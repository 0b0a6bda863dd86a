"""Which rows a table has is data: table files, and what ``--methods`` picks from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distillzoo.bench.checks import check_keys, check_list
from distillzoo.bench.recipe import Pair, Recipe
from distillzoo.bench.yamls import read_yaml
from distillzoo.build import describe_distiller, list_distillers, resolve_distiller
from distillzoo.errors import OptionError, UnknownNameError, unknown_name

__all__ = ["TABLES", "Row", "TableSpec", "list_tables", "load_table", "select_rows"]

TABLES = Path(__file__).with_name("tables")
"""The folder of the table files that come with the package."""

_TABLE_FIELDS = ("title", "baseline", "rows", "published", "note")
_DEFAULTS = "the methods' defaults"
_ROW_FIELDS = ("title", "method", "options", "weights", "pairs", "source", "extra")


@dataclass(frozen=True)
class Row:
    """One row: a method with its settings.

    Args:
        name: What ``--methods`` calls it.
        title: What the table prints.
        method: Registered name or composition.
        options: Options of the method.
        weights: Weights by term, or the name of a preset.
        pairs: Options and weights that differ for some pair: ``{"vgg13:vgg8": {"options": {...}}}``.
        source: Where the settings come from; captions give what stands before a colon.
        extra: Whether it is run only where ``--methods`` names it.
        point: Values of the swept fields, by path.
    """

    name: str
    title: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] | str | None = None
    pairs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: str = ""
    extra: bool = False
    point: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """Title with the swept values: what tells the rows of a sweep apart."""
        point = ", ".join(f"{path}={value}" for path, value in self.point)
        return f"{self.title} [{point}]" if point else self.title

    def settings(self, pair: Pair) -> tuple[dict[str, Any], Mapping[str, Any] | str | None]:
        """Return options and weights for a pair, as ``build_distiller`` takes them."""
        special = self.pairs.get(str(pair), {})
        options = merge(self.options, special.get("options") or {})
        self._check_options(options)
        return options, self._merged(self.weights, special.get("weights"))

    def override(self, options: Mapping[str, Any], weights: Mapping[str, Any] | str | None = None) -> Row:
        """Return the row with options and weights over its own, for every pair: what it has for single pairs gives way too.

        Args:
            options: Options that are set.
            weights: Weights by term that are set, or a preset that replaces all; ``None`` leaves them.
        """
        pairs = {
            pair: {
                **special,
                "options": merge(special.get("options") or {}, options),
                "weights": None if special.get("weights") is None else self._merged(special["weights"], weights),
            }
            for pair, special in self.pairs.items()
        }
        return replace(self, options=merge(self.options, options), weights=self._merged(self.weights, weights), pairs=pairs)

    def _merged(self, base: Mapping[str, Any] | str | None, over: object) -> Mapping[str, Any] | str | None:
        """Merge weights; of a preset that terms go over, the other terms stay as far as they are not the method's own default."""
        if isinstance(base, str) and isinstance(over, Mapping):
            self._check_options(self.options)
            usual, preset = (describe_distiller(self.method, weights=name, **self.options)["weights"] for name in (None, base))
            base = {term: weight for term, weight in preset.items() if weight != usual.get(term)}
        return merge_weights(base, over)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        for reserved in ("name", "weights"):
            if reserved in options:
                raise OptionError(
                    f"{reserved!r} is no option of {self.name!r}: weights are set beside the options (weights: {{...}} "
                    f"or --{self.name}.weights); take it out."
                )

    def describe(self, pair: Pair) -> dict[str, Any]:
        """Return the resolved options and weights for a pair: every default filled in."""
        options, weights = self.settings(pair)
        return describe_distiller(self.method, weights=weights, **options)

    def needs_teacher(self, pair: Pair) -> bool:
        """Whether the method, or a member of the composition, reads a teacher."""
        options, methods = self.describe(pair)["options"], resolve_distiller(self.method)
        return any(cls.reads_teacher(options[name] if len(methods) > 1 else options) for name, cls in methods.items())


@dataclass(frozen=True)
class TableSpec:
    """A table file.

    Args:
        name: Name of the file.
        title: Title of the table.
        rows: Its rows, in order.
        baseline: Name of the row that others are compared with.
        published: Published figures.
        note: A sentence for the caption.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    baseline: str = "kd"
    published: tuple[Mapping[str, Any], ...] = ()
    note: str = ""

    def published_figures(self, row: str, pair: Pair) -> list[tuple[str, float]]:
        """Return what was published for a row and a pair, with the source's short name."""
        found = [(str(source["label"]), source["values"].get(row, {}).get(str(pair))) for source in self.published]
        return [(label, float(value)) for label, value in found if value is not None]

    def published_protocols(self, row: str) -> dict[str, str]:
        """Return, by short name of the source, under which other protocol it got a row's figures."""
        found = {str(source["label"]): source.get("protocols", {}).get(row) for source in self.published}
        return {label: str(protocol) for label, protocol in found.items() if protocol is not None}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings of options; mappings inside (a composition's members) are merged too."""
    merged = dict(base)
    for key, value in over.items():
        present = merged.get(key)
        merged[key] = merge(present, value) if isinstance(present, Mapping) and isinstance(value, Mapping) else value
    return merged


def merge_weights(base: Mapping[str, Any] | str | None, over: object) -> Mapping[str, Any] | str | None:
    """Merge weights: a preset name replaces, a mapping goes over a mapping."""
    if over is None:
        return base
    if isinstance(over, str):
        return over
    if not isinstance(over, Mapping):
        raise OptionError(f"weights are numbers by term, as {{kd: 0.9}}, or the name of a preset; got {over!r}.")
    return {**base, **over} if isinstance(base, Mapping) else dict(over)


def list_tables() -> list[str]:
    """Return the names of the table files."""
    return sorted(path.stem for path in TABLES.glob("*.yaml") if not path.stem.endswith("_published"))


def load_table(name: str) -> TableSpec:
    """Read a table file, by name or path.

    Raises:
        UnknownNameError: If there is no such table.
        OptionError: If the file is not valid.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else TABLES / f"{name}.yaml"
    if not path.is_file():
        raise UnknownNameError(unknown_name("table", name, list_tables(), listed="There are"))
    found = read_yaml(path)
    where = f"the table {path.stem!r}"
    check_keys(found, _TABLE_FIELDS, where)
    entries = found.get("rows") or {}
    if not isinstance(entries, Mapping):
        raise OptionError(f"The rows of {where} must be a mapping of names to fields, as 'kd: {{}}'; got {entries!r}.")
    rows = [_make_row(str(key), value, where) for key, value in entries.items()]
    check_list(f"rows of {where}", [row.name for row in rows])
    if "baseline" in found and found["baseline"] not in [row.name for row in rows]:
        known = [row.name for row in rows]
        raise UnknownNameError(unknown_name(f"baseline of {where}", str(found["baseline"]), known, listed="Its rows are"))
    published = read_yaml(TABLES / f"{found['published']}.yaml")["sources"] if found.get("published") else ()
    title, baseline, note = (
        str(found.get(key, default)) for key, default in (("title", path.stem), ("baseline", "kd"), ("note", ""))
    )
    return TableSpec(path.stem, title, tuple(rows), baseline, tuple(published), note)


def _make_row(key: str, value: Any, where: str) -> Row:
    value = value or {}
    where = f"row {key!r} of {where}"
    check_keys(value, _ROW_FIELDS, where)
    options, given = ({} if value.get(name) is None else value[name] for name in ("options", "pairs"))
    check_keys(options, None, f"options of {where}")
    check_keys(given, None, f"pairs of {where}")
    pairs = {}
    for pair, found in given.items():
        special = {} if found is None else found
        check_keys(special, ("options", "weights"), f"pairs, {pair} of {where}")
        if special.get("options") is not None:
            check_keys(special["options"], None, f"options of {pair} of {where}")
        pairs[str(Pair.parse(str(pair)))] = special
    extra = value.get("extra", False)
    if not isinstance(extra, bool):
        raise OptionError(f"extra of {where} must be true or false; got {extra!r}; correct it.")
    return Row(
        name=str(key),
        title=str(value.get("title", key)),
        method=str(value.get("method", key)),
        options=options,
        weights=value.get("weights"),
        pairs=pairs,
        source=str(value.get("source", "")),
        extra=extra,
    )


def select_rows(table: TableSpec, recipe: Recipe) -> tuple[Row, ...]:
    """Return the rows that a recipe asks for, its options and weights applied.

    Raises:
        UnknownNameError: If a name is neither a row, nor registered, nor a composition of registered names.
        OptionError: If an option does not exist.
    """
    known = {row.name: row for row in table.rows}
    names = recipe.methods
    if names is None:
        chosen = [row for row in table.rows if not row.extra]
    elif names == ("all",):
        chosen = [known.get(name) or _plain_row(name) for name in _all_names(table)]
    else:
        if "all" in names:
            raise OptionError(f"'all' in methods stands alone; got {', '.join(names)}; write all, or the names.")
        chosen = [known.get(name) or _registered(name, known) for name in names]
    for field_name in ("options", "weights"):
        for name in getattr(recipe, field_name):
            if name not in {row.name for row in chosen}:
                raise OptionError(
                    unknown_name(f"row under {field_name}", name, [row.name for row in chosen], listed="This table has")
                )
    rows = tuple(row.override(recipe.options.get(row.name, {}), recipe.weights.get(row.name)) for row in chosen)
    for row in rows:
        row.describe(Pair("", ""))  # unknown methods and options die here
    return rows


def _all_names(table: TableSpec) -> list[str]:
    """Every registered name once, the table's rows first and in its order."""
    registered = list_distillers()
    rows = [row.name for row in table.rows if row.method in registered]
    return rows + [name for name in registered if name not in {row.method for row in table.rows}]


def _registered(name: str, rows: Mapping[str, Row]) -> Row:
    try:
        return _plain_row(name)
    except UnknownNameError:
        known = sorted({*rows, *list_distillers()})
        if "+" in name:
            part = next(part.strip() for part in name.split("+") if part.strip() not in list_distillers())
            raise UnknownNameError(unknown_name(f"method in {name!r}:", part, list_distillers())) from None
        raise UnknownNameError(
            unknown_name("method", name, known, listed="Rows of this table and registered names") + " 'all' runs every one."
        ) from None


def _plain_row(name: str) -> Row:
    """Return the row of a method that the table does not list, under the paper's spelling of its name."""
    return Row(name, " + ".join(cls.__name__ for cls in resolve_distiller(name).values()), name, source=_DEFAULTS)
