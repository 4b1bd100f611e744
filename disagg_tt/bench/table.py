"""What a benchmark prints: a table a stage, with one row a measurement, then all of it as one JSON line."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from disagg_tt.errors import InputError

COMPARE = {"==": operator.eq, ">=": operator.ge, "<=": operator.le}
HEADINGS = ("ours", "reference", "unit", "ratio", "goal", "met")


@dataclass(frozen=True)
class Row:
    """One measurement and its reference, both in `unit` and from the same run.

    Attributes:
        stage: the name under which --rows selects it.
        goal: what the ratio (ours / reference) should be, such as ">= 1.5"; "" where there is no goal.
        required: the command fails when the goal is not met. Never set for a time.
    """

    stage: str
    name: str
    ours: float
    reference: float
    unit: str
    goal: str = ""
    required: bool = False

    @property
    def ratio(self) -> float | None:
        """Ours / reference, None when the reference is 0."""
        return self.ours / self.reference if self.reference else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, None where there is none."""
        if not self.goal:
            return None
        sign, value = self.goal.split()
        return self.ratio is not None and bool(COMPARE[sign](self.ratio, float(value)))

    @property
    def failed(self) -> bool:
        return self.required and not self.met


def table(rows: Sequence[Row]) -> str:
    """Return `rows` as aligned text; above the rows of each stage is a line with its name and the headings."""
    return "\n\n".join(_block(list(group)) for _, group in groupby(rows, lambda row: row.stage))


def _block(rows: Sequence[Row]) -> str:
    cells: list[tuple[str, ...]] = [(rows[0].stage, *HEADINGS)]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        met = {None: "", True: "yes", False: "no"}[row.met]
        cells.append((row.name, figure(row.ours), figure(row.reference), row.unit, ratio, row.goal, met))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column in (0, 3) else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def figure(value: float) -> str:
    """Return `value` with four digits, or whole when it is a whole number."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def json_line(rows: Iterable[Row], **about: Any) -> str:
    """Return `rows` and what is known `about` the run as one line of JSON."""
    entries = [{**asdict(row), "ratio": row.ratio, "met": row.met} for row in rows]
    return json.dumps({**about, "rows": entries})


def check_files(json_file: Path | None, plot_file: Path | None) -> None:
    """Raise InputError where --json or --plot could not be written in the end: it is said before anything is measured."""
    for flag, file in (("--json", json_file), ("--plot", plot_file)):
        if file and not file.parent.is_dir():
            raise InputError(f"{flag} {file}: the folder {file.parent} does not exist")
    if plot_file and not find_spec("matplotlib"):
        raise InputError("--plot needs matplotlib: pip install 'disagg_tt[plot]'")
