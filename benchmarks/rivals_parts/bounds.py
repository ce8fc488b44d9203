"""The planner's answers beside the fixed plans that fit, and the bounds, on rows of `process`."""

from collections.abc import Iterator, Mapping

from benchmarks.result import Result, Row

SLOWEST, LEAST_GAIN = 1.01, 1.10


def check(rows: Mapping[str, Row]) -> list[str]:
    """Returns a line for each bound that does not hold, of all shapes."""
    return [f"{shape}: {text}" for shape, row in rows.items() for text in failures(row)]


def failures(row: Row) -> Iterator[str]:
    """Yields a line for each bound that does not hold for one shape."""
    if "error" in row:
        yield row["error"]
    found = compared(row)
    if not found:
        yield "no budget was timed"
    for one in row.get("budgets", ()):
        if one.get("compiled_bytes", 0) > one["budget_bytes"]:
            yield f"{_gib(one['budget_bytes']):.3f} GiB: {one['plan']} needs more than the budget"
    for one in found:
        at = f"{one['budget GiB']:.3f} GiB"
        if one["plan"] is None:
            yield f"{at}: no plan, but {one['best fixed']} fits"
        elif one["ms"] is None:
            yield f"{at}: {one['plan']} was not timed"
        elif (ratio := one["of best fixed"]) is not None and ratio > SLOWEST:
            yield f"{at}: {one['plan']} takes {ratio:.3f} of {one['best fixed']}, bound {SLOWEST}"
    gains = [one["gain"] for one in found if one["gain"] is not None]
    if found and max(gains, default=0.0) < LEAST_GAIN:
        yield (
            f"at most {max(gains, default=0.0):.3f} times as fast as the best of MaxText's, bound "
            f"{LEAST_GAIN} at some budget"
        )


def compared(row: Row) -> list[Row]:
    """Returns a line of the table for each budget, the largest first; empty before timing."""
    return [_compared(one, row["plans"]) for one in row["budgets"]] if row.get("rounds") else []


def result(shape: str, row: Row) -> Result:
    """Returns a shape's table, what was left out, and failures."""
    plans = row.get("plans", {}).items()
    notes = [f"left out for want of time: {what}" for what in row.get("left_out", ())]
    notes += [f"{plan}: {found['error']}" for plan, found in plans if "error" in found]
    return Result(
        title=f"{shape}: {row.get('device')}, {row.get('rounds', 0)} rounds, "
        f"{row.get('compiles', 0)} compilations",
        rows=compared(row),
        notes=notes,
        failures=list(failures(row)),
    )


def _compared(budget: Row, plans: Mapping[str, Row]) -> Row:
    fits = {
        plan: found
        for plan, found in plans.items()
        if "seconds" in found and "error" not in found
        if found["is_fixed"] and found["peak_bytes"] <= budget["budget_bytes"]
    }
    theirs = {plan: found for plan, found in fits.items() if found["maxtext"]}
    ours = plans.get(budget.get("plan", ""), {}).get("seconds")
    fixed, fixed_seconds = _fastest(fits)
    maxtext, maxtext_seconds = _fastest(theirs)
    share = lambda a, b: None if a is None or b is None else a / b
    ms = lambda seconds: None if seconds is None else 1e3 * seconds
    return {
        "budget GiB": _gib(budget["budget_bytes"]),
        "plan": budget.get("plan"),
        "ms": ms(ours),
        "best fixed": fixed,
        "its ms": ms(fixed_seconds),
        "of best fixed": share(ours, fixed_seconds),
        "best of MaxText": None if maxtext is None else theirs[maxtext]["maxtext"][0],
        "MaxText ms": ms(maxtext_seconds),
        "gain": share(maxtext_seconds, ours),
    }


def _fastest(plans: Mapping[str, Row]) -> tuple[str | None, float | None]:
    plan = min(plans, key=lambda name: plans[name]["seconds"], default=None)
    return plan, None if plan is None else plans[plan]["seconds"]


def _gib(size: int) -> float:
    return size / 2**30
