"""Divide and conquer: the walk that `binomial` and `optimal_chain` share, and textbook halving.

Every persistent schedule is a tree (Griewank and Walther 2000, section 2; Beaumont et al. 2019,
section 4). To reverse a run of blocks from its input, either record the first block and go on with
the rest, or advance to a split, reverse the right part, come back and reverse the left part.
Halving always splits in the middle; with equally many slots, `binomial` needs no more forwards.
"""

from collections.abc import Callable, Iterator

from jaxckpt.schedules.actions import Action, Advance, Free, Load, Record, Reverse, Store, whole
from jaxckpt.schedules.schedule import Schedule

# (start, stop, room) -> (split, room of the right part): how to reverse blocks start..stop-1, at
# least two; `room` is the algorithm's own measure. A split equal to `start` records that block.
Choose = Callable[[int, int, int], tuple[int, int]]


def recursive(num_blocks: int) -> Schedule:
    """Returns textbook halving: the right half is always reversed in the sweep that reached it.

    It has `(L / 2) log2 L` extra forwards and `log2 L` slots if L is a power of two. For other L
    the left half is the smaller one, because the left half is recomputed.

    Args:
      num_blocks: The number of blocks, L.

    Raises:
      TypeError: `num_blocks` is not an integer.
      ValueError: `num_blocks` is less than 1.

    Examples:
      >>> recursive(32).extra_forwards    # 32 / 2 * log2(32)
      80
    """
    num_blocks = whole("num_blocks", num_blocks, least=1)
    actions = unfold(num_blocks, lambda start, stop, room: ((start + stop) // 2, room), room=0)
    return Schedule(num_blocks, actions, "recursive()")


def unfold(num_blocks: int, choose: Choose, room: int) -> tuple[Action, ...]:
    """Returns the actions of the tree that `choose` describes, walked from its root.

    A carry is stored at the first split of its run and freed at its last load. Slots in use are
    always 0, 1, .. with increasing carries, so a sweep fills slots in order.

    Args:
      num_blocks: The number of blocks, L.
      choose: Chooses the split of a run of at least two blocks.
      room: The room that `choose` gets for the whole stack; left parts inherit it.
    """
    actions: list[Action] = []
    for action in _walk(num_blocks, choose, room):
        last = actions[-1] if actions else None
        if isinstance(action, Record) and isinstance(last, Record):
            actions[-1] = Record(last.start, action.stop)  # consecutive records are one action
        else:
            actions.append(action)
    return tuple(actions)


def _walk(num_blocks: int, choose: Choose, room: int) -> Iterator[Action]:
    # An explicit stack: runs may nest as deeply as there are blocks, too deep for Python's calls.
    pending: list[tuple[int, int, int, bool] | Reverse] = [(0, num_blocks, room, False)]
    slots_in_use = 0
    while pending:
        task = pending.pop()
        if isinstance(task, Reverse):
            yield task
            continue
        start, stop, room, is_stored = task
        if is_stored:
            yield Load(slots_in_use - 1)
        split, right_room = choose(start, stop, room) if stop - start > 1 else (start, room)
        if split == start:
            if is_stored:
                slots_in_use -= 1
                yield Free(slots_in_use)
            yield Record(start, start + 1)
            pending.append(Reverse(start))
            if stop - start > 1:
                pending.append((start + 1, stop, right_room, False))
            continue
        if not is_stored:
            yield Store(slots_in_use)
            slots_in_use += 1
        yield Advance(start, split)
        pending.append((start, split, room, True))
        pending.append((split, stop, right_room, False))
