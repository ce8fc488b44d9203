"""Bytes that a function moves once XLA has fused it: a model of the compiler, on the jaxpr.

The rules, for one body without calls (`flat.Flat`):

1. Steps that nothing depends on are dropped.
2. Matrix products, attention kernels, loops and sorts are not fused: their inputs are in memory
   when they start, their outputs when they end.
3. Elementwise steps fuse with one another as long as no step of rule 2 and no reduction lies
   between them; a reduction fuses with the steps that make its input. A fused group reads each of
   its inputs once and writes the values that other groups read.
4. A group recomputes an elementwise value from its sources instead of reading it, if they are
   hardly larger than the value: a cast, a broadcast, a scaled or normalized array. A value that
   depends on no array (a mask from `iota`, zeros) is free until a step of rule 2 reads it.
5. A slice or gather reads as much as it returns; an update in place moves the update. A fused
   group writes a row of a loop's stacked output directly, if nothing else needs that row in
   memory; otherwise the row is copied once more.
6. Random bits and collectives take longer than their bytes. They count as the bytes of device
   memory that take the same time, so that a roofline needs no more rates.

The real compiler fuses less in some places (reductions over different axes) and more in others
(epilogues of matrix products).

How rule 6 counts:

- Threefry takes about 57 integer operations per word of four bytes: two words take 20 rounds of an
  addition, a rotation and an exclusive or, and 5 additions of a key. At 14.8 T operations per
  second (H100: 64 lanes per multiprocessor) or 6 T (TPU v5e: 4096 lanes) this takes as long as
  writing the word about twice. Keys of `rbg` use the chip's own generator.
- A link between chips is about ten times slower than memory: an H100's NVLink has 450 GB/s and its
  memory 3352, a TPU v5e's link 45 and its memory 819. An all-reduce sends its array twice.

Only collectives in the jaxpr are seen, such as `jax.shard_map`'s. Collectives that XLA's
partitioner adds for sharded arrays are in no jaxpr.
"""

import dataclasses

from jaxckpt.costs.flat import Flat, Step, Value
from jaxckpt.costs.flops import is_kernel
from jaxckpt.transforms import jaxprs

# Views of an array: nothing moves, because a product reads any layout.
_VIEWS = frozenset((jaxprs.BITCAST, jaxprs.TAG, jaxprs.ROUND))
_VIEWS |= {*jaxprs.SHAPES, *jaxprs.COPIES, *jaxprs.PLACEMENTS}
_PARTS = jaxprs.SLICES | jaxprs.JOINS
# Rule 4: sources up to this many times as large as the value are read in its place.
_SLACK = 1.1
_UNFUSED = frozenset((jaxprs.BARRIER, *jaxprs.SORTS, *jaxprs.RANDOM_BITS, *jaxprs.CUMULATIVE))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """The bytes that one run of a body moves, without its kernels and nested bodies.

    Attributes:
      memory_bytes: Bytes read and written by fused groups, reductions, sorts and copies.
      host_bytes: Bytes copied between device and host.
      kernel_bytes: For each product or kernel, the bytes of its inputs and outputs.
      nested: Loops, conds and other steps with functions of their own.
    """

    memory_bytes: int
    host_bytes: int
    kernel_bytes: dict[Step, int]
    nested: tuple[Step, ...]


def traffic(flat: Flat, stacked: int = 0) -> Traffic:
    """Returns the bytes that one run of a body moves.

    The last `stacked` outputs are rows of a loop's stacked outputs.
    """
    return _Model(flat, stacked).traffic()


def kind_of(step: Step) -> str:
    """Returns how a step runs: kernel, nested, copy, reduce, update, scatter, fused or whole."""
    name = step.name
    if is_kernel(step):
        return "kernel"
    if is_collective(step):
        return "whole"
    if name == jaxprs.PUT:
        space = lambda value: getattr(value.aval, "memory_space", None)
        is_moved = list(map(space, step.inputs)) != list(map(space, step.outputs))
        return "copy" if is_moved else "fused"
    if name.startswith(jaxprs.SCATTERS):
        return "scatter"
    if name != jaxprs.ROUND and name.startswith(jaxprs.REDUCTIONS):
        return "reduce"
    if any(True for _ in jaxprs.subjaxprs(step.equation)):
        return "nested"
    if name == jaxprs.UPDATE:
        return "update"
    if name in _UNFUSED:
        return "whole"
    if name in _VIEWS or name == jaxprs.BROADCAST or name in _PARTS or _is_elementwise(step):
        return "fused"
    return "whole"


def is_view(step: Step) -> bool:
    """Returns whether a step only returns a view of its input."""
    return step.name in _VIEWS


def _is_elementwise(step: Step) -> bool:
    """Whether a step has one output and its inputs have its shape, or axes of 1 instead."""
    if len(step.outputs) != 1:
        return False
    shape = _shape(step.outputs[0])
    shapes = [_shape(value) for value in step.inputs if _shape(value)]
    return all(
        len(found) == len(shape)
        and all(size in (1, out) for size, out in zip(found, shape, strict=True))
        for found in shapes
    )


def _shape(value: Value) -> tuple:
    return getattr(value.aval, "shape", ())


class _Model:
    """The rules applied to one body; every attribute is filled in once, in order."""

    def __init__(self, flat: Flat, stacked: int):
        self.outputs, self.stacked = flat.outputs, stacked
        self.steps = flat.live_steps()
        self.kinds: dict[Step | None, str] = {step: kind_of(step) for step in self.steps}
        self.free: set[Value] = set()
        self.level: dict[Value, int] = {}
        self.group: dict[Step, Step] = {}
        self.sources: dict[Value, tuple[Value, ...]] = {}
        for step in self.steps:
            self._place(step)

    def _place(self, step: Step):
        """Finds a step's level (rule 3) and joins it to the groups that it fuses with."""
        kind = self.kinds[step]
        inputs = [value for value in step.inputs if not self._is_free(value)]
        level = max((self.level.get(value, 0) for value in inputs), default=0)
        if kind == "fused" and not inputs:
            self.free.update(step.outputs)
        for value in step.outputs:
            self.level[value] = level + (kind != "fused")
            self.sources[value] = self._find_sources(value)
        if kind not in ("fused", "reduce", "update"):
            return
        self.group[step] = step
        for value in step.inputs[1:] if kind == "update" else inputs:
            made_by = value.step
            if made_by is None or self.kinds.get(made_by) != "fused":
                continue
            if self.level[value] == level:
                self.group[self._root(made_by)] = self._root(step)

    def _root(self, step: Step) -> Step:
        while self.group[step] is not step:
            self.group[step] = self.group[self.group[step]]
            step = self.group[step]
        return step

    def _is_free(self, value: Value) -> bool:
        return value in self.free or (value.constant is not None and not _shape(value))

    def _base(self, value: Value) -> Value:
        """Returns the array that `value` is a view of."""
        while value.step is not None and value.step.name in _VIEWS:
            if self._is_free(value):
                break
            value = value.step.inputs[0]
        return value

    def _sources(self, value: Value) -> tuple[Value, ...]:
        """Returns the arrays that a group reads where it needs `value` (rule 4)."""
        base = self._base(value)
        return self.sources.get(base, (base,))

    def _find_sources(self, value: Value) -> tuple[Value, ...]:
        step = value.step
        if step is None or self.kinds.get(step) != "fused" or step.name in _PARTS:
            return (value,)
        inputs = [v for v in step.inputs if not self._is_free(v)]
        found = dict.fromkeys(source for v in inputs for source in self._sources(v))
        if sum(source.nbytes for source in found) > _SLACK * value.nbytes:
            return (value,)
        return tuple(found)

    def traffic(self) -> Traffic:
        """Returns the body's bytes."""
        reads: dict[tuple[Step, Value], int] = {}
        first_row = len(self.outputs) - self.stacked
        needed = {self._base(value) for value in self.outputs[:first_row]}
        moved = host = 0
        kernel_bytes, nested = {}, []
        for step in self.steps:
            kind = self.kinds[step]
            if kind in ("fused", "reduce", "update"):
                self._read(step, kind, reads)
                moved += step.inputs[1].nbytes if kind == "update" else 0
                continue
            bases = [self._base(value) for value in step.inputs]
            needed.update(bases)
            size = sum(v.nbytes for v in bases) + sum(v.nbytes for v in step.outputs)
            if kind == "kernel":
                kernel_bytes[step] = size
            elif kind == "nested":
                nested.append(step)
            elif kind == "copy":
                host += size // 2
                moved += size // 2
            elif kind == "scatter":
                # In place: indices and updates are read, the updated places read and written.
                moved += step.inputs[1].nbytes + 3 * step.inputs[2].nbytes
            elif step.name != jaxprs.BARRIER:
                moved += size + extra_bytes(step)
        moved += sum(min(size, value.nbytes) for (_, value), size in reads.items())
        needed.update(value for _, value in reads)
        rows = [self._base(value) for value in self.outputs[first_row:]]
        moved += sum(self._row_bytes(row, needed) for row in rows)
        moved += sum(value.nbytes for value in needed if self._is_written(value))
        return Traffic(
            memory_bytes=moved, host_bytes=host, kernel_bytes=kernel_bytes, nested=tuple(nested)
        )

    def _read(self, step: Step, kind: str, reads: dict):
        """Adds the values that a step's group reads from memory for this step."""
        if is_view(step):  # the step that reads the view reads its base
            return
        root = self._root(step)
        for value in step.inputs[1:] if kind == "update" else step.inputs:
            if self._is_free(value) or self._is_inside(self._base(value), root):
                continue
            for source in self._sources(value):
                if self._is_inside(source, root):
                    continue
                size = source.nbytes
                if step.name in jaxprs.SLICES:
                    size = sum(out.nbytes for out in step.outputs)
                reads[root, source] = reads.get((root, source), 0) + size

    def _is_inside(self, value: Value, root: Step) -> bool:
        made_by = value.step
        if made_by is None or self.kinds.get(made_by) != "fused":
            return False
        return self._root(made_by) is root

    def _is_written(self, value: Value) -> bool:
        """Whether a fused group writes the value to memory."""
        return self.kinds.get(value.step) in ("fused", "reduce")

    def _row_bytes(self, row: Value, needed: set[Value]) -> int:
        """Returns the bytes that writing a row of a stacked output moves (rule 5)."""
        if self.kinds.get(row.step) == "copy":  # the row goes to the host
            return 0
        return (1 if self._is_written(row) and row not in needed else 2) * row.nbytes


_RANDOM_SHARE = 2
_LINK_SHARE = 10
# Collective -> how often its array crosses a link.
_COLLECTIVES = {
    **dict.fromkeys(jaxprs.ALL_REDUCES, 2),
    **dict.fromkeys((*jaxprs.GATHERS, *jaxprs.EXCHANGES), 1),
}


def is_collective(step: Step) -> bool:
    """Returns whether a step sends arrays between devices."""
    return step.name in _COLLECTIVES


def extra_bytes(step: Step) -> int:
    """Returns the time of a step beyond its memory traffic, in bytes (rule 6); 0 for most steps."""
    inputs = sum(value.nbytes for value in step.inputs)
    outputs = sum(value.nbytes for value in step.outputs)
    if step.name in jaxprs.RANDOM_BITS:
        is_hardware = any("rbg" in str(value.aval.dtype) for value in step.inputs)
        return 0 if is_hardware else _RANDOM_SHARE * outputs
    return _LINK_SHARE * _COLLECTIVES.get(step.name, 0) * max(inputs, outputs)
