"""Tables of the planner's page: its answers, as compiled for absent chips and as timed on a GPU."""

from typing import Any

from benchmarks.page_tables import gib, load, markdown
from benchmarks.planner_bounds import figures
from benchmarks.rivals_bounds import compared


def rivals() -> str:
    """The answers beside fixed plans, timed in turns."""
    header = (
        "GPU",
        "batch x tokens",
        "budget, GiB",
        "the planner's answer",
        "ms",
        "best fixed plan",
        "ms",
    )
    rows = [
        (
            *(
                gpu.upper(),
                shape.replace("x", " x "),
                f"{one['budget GiB']:.2f}",
                f"`{one['plan']}`",
            ),
            *(f"{one['ms']:.1f}", f"`{one['best fixed']}`", f"{one['its ms']:.1f}"),
            *(f"`{one['best of MaxText']}`", f"{one['MaxText ms']:.1f}"),
        )
        for gpu, name in (("h200", "h200"), ("h200", "h200_16k"), ("h100", "h100"))
        for shape, found in load(f"rivals_{name}.json")["rows"].items()
        for one in compared(found)
    ]
    return markdown((*header, "best of MaxText's", "ms"), rows)


def answers() -> str:
    """The answers for absent chips, budget by budget, the smallest last."""
    header = ("part", "budget, GiB", "compiled, GiB", "predicted", "FLOPs run again", "plan")
    rows = [
        (
            *(row["part"], gib(row["budget_bytes"]), gib(row["compiled_bytes"])),
            f"{row['predicted_bytes'] / row['compiled_bytes'] - 1:+.2%}",
            *(_tera(row["recomputed_flops"]), f"`{row['plan']}`"),
            "-" if row["fixed_plan"] is None else f"`{row['fixed_plan']}`",
            _tera(row["fixed_recomputed_flops"]),
        )
        for row in load("planner_absent.json")["rows"]
    ]
    return markdown((*header, "cheapest fixed plan", "its FLOPs run again"), rows)


def planner_bounds_table() -> str:
    """How the same answers keep what is promised, a row a part."""
    header = {
        "part": "part",
        "budgets": "budgets",
        "median": "off in the median",
        "worst": "off at worst",
        "compiles": "compilations at most",
        "planned": "planned beside them in",
        "failures": "bounds that do not hold",
    }
    found = figures(load("planner_absent.json")["rows"])
    rows = [tuple((one[name] or "none") for name in header) for one in found]
    return markdown(tuple(header.values()), rows)


def _tera(flops: Any) -> str:
    return "-" if flops is None else f"{flops / 1e12:.2f} T"


PLANNER_TABLES = {
    "planner-answers": answers,
    "planner-bounds": planner_bounds_table,
    "planner-rivals": rivals,
}
