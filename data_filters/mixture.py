"""Mix trajectories with tools and without (or any other parts) at exact proportions, ready for TRL.

    - mixture: {proportions: {tool: 1, text: 1}}
    - mixture: {by: domain, proportions: {maths: 3, code: 1}, total: 8000}

Text-only trajectories keep a model's skill without tools while it learns to call them (TRICE, arXiv 2605.06326, names
the lever; its proportion is not published: half and half is our choice, to be swept). They should come from the
student's own family: text from a weaker source did not save a model that was trained on tool calls.

The prompt tells the two modes apart. A row with tools gets the column `tools`, which TRL renders into the prompt's
tools block; a row without has null there and no block. `chat_template_kwargs` (`enable_thinking`) may differ by part.

Counts are exact: the largest whole numbers in the given proportions, or those of `total`, by largest remainder. Which
rows of a part stay is drawn by `seed` and id. Controls: the same mixture under another seed, and one part alone
(`proportions: {tool: 1}`).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..core.errors import DataError
from ..core.tool_protocol import TOOLS
from .columns import source_names, values_of
from .result import FilterResult, ShowProgress, bar_of, json_column
from .selection import count_by, seeded_order

MODE, TOOL, TEXT = "mode", "tool", "text"
READ_ROWS = 512


@dataclass
class MixtureConfig:
    """What to mix, and how much of each."""

    proportions: dict[str, float] = field(
        metadata={"help": "Part -> its share, in any unit: {tool: 1, text: 1}. Rows of other parts are dropped."}
    )
    by: str = field(
        default=MODE,
        metadata={"help": "What the parts are: `mode` (tool: the row calls or offers a tool; text: it does not), or a "
                          "column of the data, such as `source`."},
    )  # fmt: skip
    total: int | None = field(
        default=None, metadata={"help": "Rows to keep; default: as many as the scarcest part allows."}
    )
    chat_template_kwargs: dict[str, dict[str, Any]] = field(
        default_factory=dict,
        metadata={"help": "Part -> variables of the chat template for its rows: {text: {enable_thinking: false}}."},
    )

    def __post_init__(self):
        if not self.proportions or any(not share > 0 for share in self.proportions.values()):
            raise ValueError(f"`proportions` needs parts with a share above 0, got {self.proportions}")
        if self.by == MODE and (wrong := set(self.proportions) - {TOOL, TEXT}):
            raise ValueError(f"with `by: mode` the parts are {TOOL} and {TEXT}, got {', '.join(sorted(wrong))}")
        if wrong := set(self.chat_template_kwargs) - set(self.proportions):
            raise ValueError(f"`chat_template_kwargs` names {', '.join(sorted(wrong))}, which `proportions` does not")
        if self.total is not None and self.total < len(self.proportions):
            raise ValueError(f"`total` must be at least one row of each part, got {self.total}")


def check(table: Dataset, config: MixtureConfig, filled: set[str]) -> None:
    """Refuse a column that is not there.

    Raises:
        DataError: names the columns there are.
    """
    if config.by != MODE and config.by not in table.column_names and config.by not in filled:
        raise DataError(
            f"`mixture` with `by: {config.by}` needs a column of that name; the data have "
            f"{', '.join(table.column_names)}. Map yours with `columns: {{{config.by}: <your column>}}`."
        )


def mode_of(completion: Sequence[Mapping[str, Any]], tools: Any) -> str:
    """Say whether a trajectory is one with tools: it offers some, or calls some."""
    calls = any(message["role"] == "tool" or message.get("tool_calls") for message in completion)
    return TOOL if tools or calls else TEXT


def counts_of(total: int, proportions: Mapping[str, float]) -> dict[str, int]:
    """Share out `total` rows by largest remainder; equal remainders go to the part that is named first.

    The counts add up to `total`, and none is a whole row away from its exact share.
    """
    whole = sum(proportions.values())
    exact = {part: total * share / whole for part, share in proportions.items()}
    counts = {part: int(share + 1e-9) for part, share in exact.items()}  # 1e-9: 3 * (1 / 3) is three rows
    order = sorted(exact, key=lambda part: counts[part] - exact[part])
    for part in order[: total - sum(counts.values())]:
        counts[part] += 1
    return counts


def largest_total(have: Mapping[str, int], proportions: Mapping[str, float]) -> int:
    """Return the most rows that can be had in these proportions."""
    whole = sum(proportions.values())
    # No count exceeds its exact share by a whole row.
    total = int(min((have.get(part, 0) + 1) * whole / share for part, share in proportions.items()) + 1e-9)
    while any(count > have.get(part, 0) for part, count in counts_of(total, proportions).items()):
        total -= 1
    return total


def apply(
    table: Dataset, config: MixtureConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Keep the rows of the mixture; adds `tools` and `chat_template_kwargs`.

    Raises:
        DataError: a part has too few rows for `total`, or none.
    """
    parts: list[str] = []
    tools: list[Any] = []
    columns = table.select_columns([c for c in ("completion", "tools", config.by) if c in table.column_names])
    with bar_of(progress, "mixture", len(table)) as bar:
        for start in range(0, len(table), READ_ROWS):
            batch = columns[start : start + READ_ROWS]
            offered = list(map(_read_tools, batch.get("tools", [None] * len(batch["completion"]))))
            modes = list(map(mode_of, batch["completion"], offered))
            tools += [(of_row or TOOLS) if mode == TOOL else None for mode, of_row in zip(modes, offered, strict=True)]
            parts += modes if config.by == MODE else map(str, batch[config.by])
            bar.advance(len(modes))
    have = Counter(parts)
    total = largest_total(have, config.proportions) if config.total is None else config.total
    wanted = counts_of(total, config.proportions)
    if short := {part: count for part, count in wanted.items() if count > have[part] or not have[part]}:
        raise DataError(
            "`mixture`: "
            + ", ".join(f"{count:,} rows of `{part}` wanted, {have[part]:,} there" for part, count in short.items())
            + f" (by `{config.by}`: {', '.join(f'{part} {count:,}' for part, count in have.most_common(10))}). "
            "Give more rows of it, a smaller `total`, or other `proportions`."
        )
    dropped = _surplus(parts, values_of(table, "id"), wanted, config.by, seed)
    kwargs = [config.chat_template_kwargs.get(part, {}) for part in parts]
    scores: dict[str, Any] = {"tools": json_column(tools)}
    if config.chat_template_kwargs:
        scores["chat_template_kwargs"] = json_column(kwargs)
    kept = [row for row in range(len(parts)) if row not in dropped]
    sources = source_names(table)
    report = {
        "in": dict(sorted(have.items())),
        "kept": {part: wanted[part] for part in sorted(wanted)},
        "kept_by_source": {
            part: count_by(sources[row] for row in kept if parts[row] == part) for part in sorted(wanted)
        },
    }
    return FilterResult(scores, dropped, report)


def _read_tools(tools: Any) -> Any:
    """Read the tools of a row, which TRL takes as a list or as JSON text."""
    return json.loads(tools) if isinstance(tools, str) else tools


def _surplus(parts: list[str], ids: list[str], wanted: Mapping[str, int], by: str, seed: int) -> dict[int, str]:
    """The rows beyond each part's count, in an order drawn by seed and id, and those of parts that are not wanted."""
    dropped = {row: f"{by} {part} is not in `proportions`" for row, part in enumerate(parts) if part not in wanted}
    taken: Counter[str] = Counter()
    for row in seeded_order((row for row, part in enumerate(parts) if part in wanted), ids, seed, "mixture"):
        taken[parts[row]] += 1
        if taken[parts[row]] > wanted[parts[row]]:
            dropped[row] = f"more {parts[row]} than the mixture takes"
    return dict(sorted(dropped.items()))
