"""The plan grammar's parser.

    plan   := stage ("/" stage)*
    stage  := [count "x"] schedule ("+" policy)*      a bare policy is short for full+policy

It only cuts text into words; what the words mean is checked by `Stage` and `Policy`, whose
errors are given here the place in the text where they happened.
"""

import re

from jaxckpt.plans import words
from jaxckpt.plans.errors import PlanError, mark, nearest
from jaxckpt.plans.plan import Policy, Stage

# At most nine digits, so that no number is too long to print or to count with.
_COUNT = re.compile(r"(-?[0-9]{1,9})x(.*)", re.DOTALL)
_NUMBER = re.compile(r"-?[0-9]{1,9}")


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Returns the stages that `text` says.

    Raises:
      PlanError: One line: the text with the place marked, what is valid, the nearest guess.
    """
    stages, start = [], 0
    for piece in text.split("/"):
        stages.append(_parse_stage(text, start, start + len(piece)))
        start += len(piece) + 1
    return tuple(stages)


def _parse_stage(text: str, start: int, stop: int) -> Stage:
    count, body = None, text[start:stop]
    match = _COUNT.fullmatch(body)
    if match:
        count, body = int(match[1]), match[2]
    schedule, argument, policies = "full", None, []
    offset = stop - len(body)
    for position, word in enumerate(body.split("+")):
        place = (offset, offset + len(word))
        offset += len(word) + 1
        head, colon, tail = word.partition(":")
        if head in words.POLICIES:
            names = tuple(tail.split(",")) if colon else ()
            policies.append(_at(text, place, Policy, kind=head, names=names))
        elif head in words.SCHEDULES and position == 0:
            schedule, argument = head, _argument(text, place, tail) if colon else None
        else:
            _refuse(text, place, head, position)
    return _at(
        text,
        (start, stop),
        Stage,
        count=count,
        schedule=schedule,
        argument=argument,
        policies=tuple(policies),
    )


def _argument(text: str, place: tuple[int, int], digits: str) -> int:
    if not _NUMBER.fullmatch(digits):
        word = text[place[0] : place[1]].partition(":")[0]
        given = repr(digits) if digits else "nothing"
        raise _error(text, place, f"after {word}: stands a whole number, not {given}")
    return int(digits)


def _refuse(text: str, place: tuple[int, int], head: str, position: int):
    """Raises for a word that no table has, or a schedule that stands where a policy should."""
    if position > 0 and head in words.SCHEDULES:
        raise _error(
            text,
            place,
            f"{head!r} is a schedule and stands first in its stage; after '+' come policies: "
            f"{', '.join(words.POLICIES)}; stages are joined by '/'",
        )
    valid = [*words.SCHEDULES, *words.POLICIES] if position == 0 else list(words.POLICIES)
    kind = "schedule or policy" if position == 0 else "policy"
    what = f"{head!r} is not a {kind}" if head else f"an empty {kind}"
    raise _error(text, place, f"{what}{nearest(head, valid)}; valid: {', '.join(valid)}")


def _at(text: str, place: tuple[int, int], make, **fields):
    """Returns `make(**fields)`; its `PlanError` gets the place in the text."""
    try:
        return make(**fields)
    except PlanError as error:
        raise _error(text, place, str(error)) from None


def _error(text: str, place: tuple[int, int], message: str) -> PlanError:
    return PlanError(f"plan {mark(text, *place)!r}: {message}")
