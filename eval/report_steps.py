"""What a filter's step reports about itself, as facts and tables: any report, whatever its step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

_SHOWN_ROWS = 40


class Table(NamedTuple):
    """One table of a step's report: a row per name, cells as text."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def describe_report(report: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[Table]]:
    """Return the plain values of a step's report as (name, value), and its mappings of mappings as tables.

    Values inside a mapping of plain values are named by their path ("length: spearman"). Histograms are left out: they
    are drawn. Lists of plain values are joined; a list of mappings is a table numbered from 1.
    """
    facts: list[tuple[str, str]] = []
    tables: list[Table] = []
    _collect(report, "", facts, tables)
    return facts, tables


def _collect(report: Mapping[str, Any], path: str, facts: list[tuple[str, str]], tables: list[Table]) -> None:
    for key, value in report.items():
        name = f"{path}: {_words(key)}" if path else _words(key)
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value, 1)}
        if isinstance(value, Mapping):
            if "edges" in value:
                continue
            if value and all(isinstance(item, Mapping) for item in value.values()):
                tables.append(_table(name, value))
            else:
                _collect(value, name, facts, tables)
        elif isinstance(value, list):
            facts.append((name, ", ".join(map(_cell, value))))
        else:
            facts.append((name, _cell(value)))


def _table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    flat = {name: dict(_flat(of, "")) for name, of in rows.items()}
    columns = list(dict.fromkeys(column for of in flat.values() for column in of))
    shown = [(name, [_cell(of.get(column)) for column in columns]) for name, of in list(flat.items())[:_SHOWN_ROWS]]
    if len(flat) > _SHOWN_ROWS:
        title += f" (the first {_SHOWN_ROWS} of {len(flat)})"
    return Table(title, columns, shown)


def _flat(values: Mapping[str, Any], path: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{path}: {_words(key)}" if path else _words(key)
        if isinstance(value, Mapping):
            found += [] if "edges" in value else _flat(value, name)
        else:
            found.append((name, value))
    return found


def _words(key: Any) -> str:
    return str(key).replace("_", " ")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " to ".join(map(_cell, value)) if len(value) == 2 else ", ".join(map(_cell, value))
    return str(value)
