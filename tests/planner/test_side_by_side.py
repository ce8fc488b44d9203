"""Compilations side by side: told by events, never by a clock."""

import contextlib
import threading

import pytest

import jaxckpt
from jaxckpt.absent import launch
from jaxckpt.compiled import peak
from jaxckpt.memory.job import Job
from jaxckpt.planner.fit import solve
from jaxckpt.planner.steps import Steps
from jaxckpt.plans import Plan
from jaxckpt.targets.target import LOCAL
from tests.experiments.test_fit import report
from tests.planner import steps

ASKED = {"num_blocks": steps.NUM_BLOCKS, "target": LOCAL}
FULL, NONE = map(Plan.parse, ("full", "none"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))


def peak_of(plan) -> float:
    """A peak in GiB: the more blocks run again, the less."""
    stages = [stage for stage in plan.stages if stage.schedule == "none"]
    return 1.0 + sum(stage.count or steps.NUM_BLOCKS for stage in stages)


def jobs_of(compile_plan):
    """Returns steps whose plans are compiled by a function, which any thread may call."""
    return lambda plan: Job(compile=lambda: compile_plan(plan), report=report)


@pytest.mark.slow
@pytest.mark.parametrize("room", [2, 3])
def test_as_many_as_there_is_room_for_run_at_once(room, monkeypatch):
    monkeypatch.setattr(launch, "at_once", lambda: room)
    together = threading.Barrier(room)

    def compile_plan(plan):
        if str(plan) in ("full", "none", "3xfull/3xnone")[:room]:
            together.wait(timeout=3600)  # ends only if they are compiled at once
        return peak_of(plan)

    told = []
    of = Steps(steps.step_for, LOCAL, jobs_of(compile_plan))
    solve(of, **ASKED, budget=2**40, progress=told.append)
    texts = [one.live for one in told]
    asked = (
        "1 and 2 of at most 6: full, none",
        "1 and 2 and 3 of at most 6: full, none, 3xfull/3xnone",
    )
    assert [f"compiling {text}" for text in ("1 of at most 6: full", *asked)] == texts[:3]
    assert [one.number for one in told if not one.is_done][:3] == [1, 2, 3]
    assert told[-1].is_done and told[-1].most_left >= 0 and not told[-1].running


def test_without_room_the_next_is_not_compiled_before_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(launch, "at_once", lambda: 1)
    of = Steps(steps.step_for, LOCAL, jobs_of(peak_of))
    with of.compiling([FULL, NONE]):
        pass
    assert list(of.compiled) == [FULL]


@pytest.mark.slow
def test_answers_do_not_depend_on_the_room(monkeypatch):
    found = []
    for room in (1, 4):
        monkeypatch.setattr(launch, "at_once", lambda room=room: room)
        of = Steps(steps.step_for, LOCAL, jobs_of(peak_of))
        found.append((solve(of, **ASKED, budget=4 * 2**30), len(of.compiled)))
    (alone, compiled), (beside, with_next) = found
    assert alone == beside and alone.num_compiles == compiled <= with_next <= compiled + 3


def test_a_plan_that_does_not_compile_stops_no_other(monkeypatch):
    monkeypatch.setattr(launch, "at_once", lambda: 2)

    def compile_plan(plan):
        if plan == NONE:
            raise AssertionError("no room in the compiler")
        return peak_of(plan)

    of = Steps(steps.step_for, LOCAL, jobs_of(compile_plan))
    told = []
    of.watched(lambda *event: told.append(event))
    with of.compiling([FULL, NONE]):
        pass
    assert of.report(FULL).peak_bytes == 2**30
    for _ in range(2):
        with pytest.raises(AssertionError, match="no room in the compiler"):
            of.report(NONE)
    ends = {plan: report for plan, report, seconds in told if seconds is not None}
    assert ends[NONE] is None and ends[FULL] is not None and len(told) == 4


def test_an_interrupt_does_not_wait_for_the_compiler(monkeypatch):
    monkeypatch.setattr(launch, "at_once", lambda: 2)
    monkeypatch.setattr(launch, "_ENDING_SECONDS", 0.01)
    inside, free = threading.Event(), threading.Event()

    def compile_plan(plan):
        inside.set()
        free.wait(timeout=3600)
        return peak_of(plan)

    of = Steps(steps.step_for, LOCAL, jobs_of(compile_plan))
    try:
        with pytest.raises(KeyboardInterrupt), of.compiling([FULL, NONE]):
            assert inside.wait(timeout=3600)
            raise KeyboardInterrupt
        named = [one for one in threading.enumerate() if one.name.startswith(launch.THREADS)]
        assert named, "a compiler still runs"  # `experiments.cli` leaves in spite of it
    finally:
        free.set()


@pytest.mark.slow
def test_programs_are_lowered_here_and_compiled_in_threads(monkeypatch):
    """Two real programs are inside `compile` at one time; the step is traced in this thread."""
    monkeypatch.setattr(launch, "at_once", lambda: 2)
    together, threads, real = threading.Barrier(2), [], peak.compile_lowered

    def compile_lowered(*args, **options):
        threads.append(threading.current_thread())
        if len(threads) <= 2:
            together.wait(timeout=3600)
        return real(*args, **options)

    def step_for(plan):
        assert threading.current_thread() is threading.main_thread()
        return steps.step_for(plan)

    monkeypatch.setattr(peak, "compile_lowered", compile_lowered)
    with contextlib.suppress(jaxckpt.BudgetError):
        jaxckpt.fit(step_for, budget=1000)
    assert len(threads) >= 3 and threading.main_thread() not in threads
