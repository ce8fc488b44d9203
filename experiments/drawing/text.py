"""A timeline as text: time across, blocks up; long and deep ones are drawn to scale."""

from experiments.drawing import timeline as t
from experiments.drawing.timeline import Timeline

_SIGNS = {t.CARRY: "-", t.RESIDUALS: "=", t.FORWARD: "F", t.RECOMPUTE: "R", t.BACKWARD: "B"}
_RANK = {sign: rank for rank, sign in enumerate(" " + "".join(_SIGNS.values()))}
_MOST_COLUMNS, _MOST_ROWS = 200, 64
KEY = "F forward  R run again  B backward  - carry held  = residuals held  | the loss"


def draw(line: Timeline) -> str:
    """Returns the picture, its key, counts and policies, as lines of ASCII text."""
    per_column = -(-line.end // _MOST_COLUMNS)
    per_row = -(-line.plan.bound_count // _MOST_ROWS)
    columns, rows = -(-line.end // per_column), -(-line.plan.bound_count // per_row)
    grid = [[" "] * columns for _ in range(rows)]
    for span in (*line.held, *line.runs):
        row = grid[span.block // per_row]
        for column in range(span.start // per_column, (span.stop - 1) // per_column + 1):
            row[column] = max(row[column], _SIGNS[span.kind], key=_RANK.__getitem__)
    loss_column = line.loss_time // per_column
    width = len(str(line.plan.bound_count - 1))
    lines = [t.title(line)]
    for number in reversed(range(rows)):
        left, right = grid[number][:loss_column], grid[number][loss_column:]
        text = f"{number * per_row:>{width}} {''.join(left)}|{''.join(right)}"
        lines.append(text.rstrip())
    lines.append(KEY)
    if max(per_column, per_row) > 1:
        lines.append(f"a column is {per_column} units of time, a row {per_row} blocks")
    return "\n".join([*lines, t.counts(line), *t.policy_words(line.plan)])
