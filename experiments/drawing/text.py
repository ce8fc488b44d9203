"""A timeline as text: time across, blocks up; long and deep ones are drawn to scale."""

import textwrap

from experiments.drawing import timeline as t
from experiments.drawing.timeline import Timeline

_SIGNS = {t.CARRY: "-", t.RESIDUALS: "=", t.FORWARD: "F", t.RECOMPUTE: "R", t.BACKWARD: "B"}
_RANK = {sign: rank for rank, sign in enumerate(" " + "".join(_SIGNS.values()))}
_MOST_COLUMNS, _MOST_ROWS = 200, 64
KEY = "F forward  R recompute  B backward  - carry held  = residuals held  | the loss"


def draw(line: Timeline, width: int | None = None) -> str:
    """Returns the picture, its key, counts and policies, as lines of ASCII text.

    `width` is the number of columns of a line; without it a line is as wide as it needs to be.
    """
    digits = len(str(line.plan.bound_count - 1))
    # The block's number, a blank, and the bar of the loss take columns, too.
    most = _MOST_COLUMNS if width is None else max(1, min(_MOST_COLUMNS, width - digits - 2))
    per_column = -(-line.end // most)
    per_row = -(-line.plan.bound_count // _MOST_ROWS)
    columns, rows = -(-line.end // per_column), -(-line.plan.bound_count // per_row)
    grid = [[" "] * columns for _ in range(rows)]
    for span in (*line.held, *line.runs):
        row = grid[span.block // per_row]
        for column in range(span.start // per_column, (span.stop - 1) // per_column + 1):
            row[column] = max(row[column], _SIGNS[span.kind], key=_RANK.__getitem__)
    loss_column = line.loss_time // per_column
    lines = []
    for number in reversed(range(rows)):
        left, right = grid[number][:loss_column], grid[number][loss_column:]
        text = f"{number * per_row:>{digits}} {''.join(left)}|{''.join(right)}"
        lines.append(text.rstrip())
    notes = [KEY]
    if max(per_column, per_row) > 1:
        units = f"{per_column} unit{'s' * (per_column > 1)} of time"
        notes.append(f"a column is {units}, a row {per_row} block{'s' * (per_row > 1)}")
    notes += [t.counts(line), *t.policy_words(line.plan)]
    if width is not None:
        notes = [part for note in notes for part in textwrap.wrap(note, width)]
    return "\n".join([t.title(line), *lines, *notes])
