"""`measure` on this process's backend: the rules for each number, donation, abstract arguments."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import export
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import jaxckpt
from jaxckpt.absent import exported
from jaxckpt.compiled.peak import report_of
from jaxckpt.memory.built_step import BuiltStep
from jaxckpt.memory.measure import compile_step, jitted

X = jnp.ones((256, 256))
SIZE = 256 * 256 * 4


def test_numbers_of_a_known_function():
    report = jaxckpt.measure(lambda x, y: (x @ y) + 1, X, X)
    assert report.argument_bytes == 2 * SIZE
    assert report.output_bytes == SIZE
    assert report.alias_bytes == 0
    assert report.peak_bytes == 3 * SIZE + report.temp_bytes
    assert report.flops == 2 * 256**3
    assert report.target == "local" and "cpu" in report.source
    assert report.jax_version == jax.__version__
    assert report.usable_bytes is report.fits is None  # a CPU does not say
    assert report.compile_seconds > 0


def test_the_largest_buffers_are_named():
    report = jaxckpt.measure(lambda x, y: (x @ y).sum(), X, X)
    assert {"f32[256,256]"} == {one.shape for one in report.buffers if one.size_bytes == SIZE}
    assert {"x", "y"} <= {one.operation for one in report.buffers}


@pytest.fixture
def executables(tmp_path, monkeypatch):
    """JAX's cache of executables and ours of reports, both of this test alone."""
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path / "reports"))
    new = {"compilation_cache_dir": str(tmp_path), "persistent_cache_min_compile_time_secs": 0}
    old = {name: getattr(jax.config, f"jax_{name}") for name in new}

    def update(values):
        for name, value in values.items():
            jax.config.update(f"jax_{name}", value)
        compilation_cache.reset_cache()

    update(new)
    yield tmp_path
    update(old)


def test_an_executable_that_was_read_from_jaxs_cache_has_its_buffers(executables, monkeypatch):
    fn = lambda x: jnp.sin(x @ x).sum()
    first = jaxckpt.measure(fn, X)
    jax.clear_caches()
    assert jaxckpt.measure(fn, X).buffers == first.buffers != ()
    jax.clear_caches()
    monkeypatch.setenv("JAXCKPT_CACHE", str(executables / "elsewhere"))
    assert jaxckpt.measure(fn, X).buffers == ()  # it was read indeed


@pytest.mark.slow  # quick tests compile every program without LLVM's optimizations
def test_the_peak_is_that_of_the_program_that_users_run():
    def step(w, x, key):
        block = lambda x, w: x + jnp.tanh(x @ w) * jax.random.bernoulli(key, 0.9, x.shape)
        return jax.value_and_grad(lambda w: jaxckpt.scan_blocks(block, w, x, remat="sqrt").sum())(w)

    args = jnp.ones((6, 256, 256)), X, jax.random.key(0)
    report = jaxckpt.measure(step, *args)
    run = report_of(jax.jit(step).lower(*args).compile())
    numbers = ("peak_bytes", "argument_bytes", "output_bytes", "alias_bytes", "temp_bytes")
    assert [getattr(report, name) for name in numbers] == [getattr(run, name) for name in numbers]


def test_donation_counts_once():
    def step(x):
        return x + 1

    plain, donated = jaxckpt.measure(step, X), jaxckpt.measure(step, X, donate_argnums=0)
    assert donated.alias_bytes == SIZE
    assert donated.peak_bytes == plain.peak_bytes - SIZE
    jitted = jax.jit(step, donate_argnums=0)
    assert jaxckpt.measure(jitted, X) == donated


def test_abstract_arguments_are_enough():
    big = jax.ShapeDtypeStruct((1 << 20, 1 << 12), jnp.float32)  # 16 GiB
    assert jaxckpt.measure(lambda x: x.sum(), big).argument_bytes == 1 << 34


def test_static_arguments():
    report = jaxckpt.measure(lambda x, n: x[:n], X, 3, static_argnums=1)
    assert report.output_bytes == 3 * 256 * 4


def test_unknown_targets_are_refused_before_anything_is_traced():
    def step(x):
        raise AssertionError("traced")

    with pytest.raises(ValueError, match=r"target 'v5f-1' is not known.*'v5e-1'"):
        jaxckpt.measure(step, X, target="v5f-1")


def test_a_loop_gets_the_executable_and_its_report():
    step = lambda x: x @ x
    compiled, report = compile_step(BuiltStep(fn=step, args=(X,), donate_argnums=0))
    measured = jaxckpt.measure(step, X, donate_argnums=0)
    assert report_of(compiled).peak_bytes == measured.peak_bytes
    assert report.peak_bytes == measured.peak_bytes and report.flops == measured.flops
    assert float(compiled(jnp.ones((256, 256)))[0, 0]) == 256


# Functions that are compiled, bound or filtered already.


def nnx_step(model, optimizer, x):
    grads = nnx.grad(lambda model: jnp.square(model(x)).sum())(model)
    optimizer.update(model, grads)


@pytest.mark.parametrize("donate", [(), (0, 1)])
def test_a_step_of_nnx_modules(donate):
    """Under `nnx.jit` or not, the new weights and moments are among the outputs."""
    model = nnx.Linear(256, 256, use_bias=False, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    jitted = jaxckpt.measure(nnx.jit(nnx_step, donate_argnums=donate), model, optimizer, X)
    plain = jaxckpt.measure(nnx_step, model, optimizer, X, donate_argnums=donate)
    for report in (jitted, plain):
        assert report.flops == 2 * 2 * 256**3, "the weights' gradient is not dead code"
        assert report.output_bytes >= 3 * SIZE and report.argument_bytes >= 4 * SIZE
        assert (report.alias_bytes >= 3 * SIZE) == bool(donate)
        assert report.peak_bytes == jitted.peak_bytes


def test_options_belong_to_nnx_jit():
    model = nnx.Linear(256, 256, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"give donate_argnums and static_argnums to nnx\.jit"):
        jaxckpt.measure(nnx.jit(lambda model, x: model(x)), model, X, donate_argnums=0)


@jax.tree_util.register_pytree_node_class
class Node:
    """A node that nobody but its own class can flatten; `jax.export` cannot write its name."""

    def __init__(self, *arrays):
        self.arrays = arrays

    def tree_flatten(self):
        return self.arrays, object()

    @classmethod
    def tree_unflatten(cls, _, arrays):
        return cls(*arrays)


MODEL = nnx.Linear(4, 4, rngs=nnx.Rngs(0))


class Shared(nnx.Module):
    def __init__(self):
        self.first, self.kernel = MODEL, MODEL.kernel
        self.last = nnx.Linear(4, 2, rngs=nnx.Rngs(1))


TREES = {
    "module": MODEL,
    "state": nnx.state(MODEL),
    "variable": MODEL.kernel,
    "shared": Shared(),
    "equinox": eqx.nn.LayerNorm(4),
    "node": Node(jnp.ones(3), {"a": Node(jnp.arange(2))}),
    "key": jax.random.split(jax.random.key(0)),
}


@pytest.mark.parametrize("kind", TREES)
def test_every_tree_travels_as_its_leaves(kind):
    """As argument and as result, each leaf under its own name."""
    tree, x = TREES[kind], jnp.arange(4.0)
    fn, args = jitted(lambda x, tree: (tree, 2 * x), (x, tree))
    traveler = exported.pack(fn, args, "cpu")
    program = export.deserialize(bytearray(traveler.program))
    leaves = [x, *jax.tree.leaves(nnx.split(tree)[1] if kind in ("module", "shared") else tree)]
    assert len(traveler.names) == len(leaves) == len(program.in_avals)
    assert traveler.names[0] == "args[0]" and len({*traveler.names}) == len(leaves)
    found = program.call(*leaves)
    # Flax returns what it was given, too.
    for leaf in (2 * x, *leaves[1:]):
        assert any(one.dtype == leaf.dtype and one.shape == leaf.shape and (one == leaf).all()
                   for one in found)  # fmt: skip


def test_names_and_shardings_are_those_of_the_leaves():
    mesh = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,))
    spread = lambda *names: NamedSharding(mesh, PartitionSpec(*names))
    state = [nnx.state(nnx.Linear(4, 4, rngs=nnx.Rngs(0))) for _ in range(11)]
    place = lambda path, x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=spread(None, "x") if "kernel" in str(path) else spread()
    )
    state = jax.tree_util.tree_map_with_path(place, state)
    fn, args = jitted(lambda state: state, (state,))
    traveler = exported.pack(fn, args, "cpu")
    assert traveler.names[-1] == "args[0][10]['kernel']"
    for name, one in zip(traveler.names, traveler.placement["arguments"], strict=True):
        assert one["spec"] == ([None, "x"] if "kernel" in name else [])


def test_a_partial_keeps_what_its_function_donates():
    jitted = jax.jit(lambda y, x: x + y, donate_argnums=1)
    report = jaxckpt.measure(functools.partial(jitted, X), X)
    assert report.alias_bytes == SIZE and report.argument_bytes == 2 * SIZE
    apply = functools.partial(jax.jit(lambda x, n: x[:n], static_argnames="n"), n=3)
    assert jaxckpt.measure(apply, X).output_bytes == 3 * 256 * 4


def test_a_donation_that_would_be_lost_is_refused():
    jitted = jax.jit(lambda x, n: x + n, donate_argnums=0)
    with pytest.raises(ValueError, match=r"cannot see which .*give measure its donate_argnums"):
        jaxckpt.measure(jitted, X, 3, static_argnums=1)
    report = jaxckpt.measure(jitted, X, 3, static_argnums=1, donate_argnums=0)
    assert report.alias_bytes == SIZE


DENSE = nn.Dense(256)
VARIABLES = DENSE.init(jax.random.key(0), X)


def test_a_modules_apply():
    assert jaxckpt.measure(DENSE.apply, VARIABLES, X).argument_bytes == 2 * SIZE + 256 * 4


@pytest.mark.parametrize(
    "fn, message",
    [
        (DENSE.bind(VARIABLES), r"holds arrays, which would be constants.*measure\(module\.apply"),
        (DENSE.bind(VARIABLES).__call__, "holds arrays, which would be constants"),
        (nnx.Linear(4, 4, rngs=nnx.Rngs(0)), r"holds arrays.*lambda module, x: module\(x\)"),
        (X, "takes a function and its arguments, not float32"),
        (jax.jit(jnp.sin).lower(X), "takes a function and its arguments, not .*Lowered"),
    ],
)
def test_what_is_no_function_of_arrays_is_refused(fn, message):
    with pytest.raises(ValueError, match=message) as caught:
        jaxckpt.measure(fn, X)
    assert "\n" not in str(caught.value)


def test_an_argument_that_is_no_array_is_named():
    with pytest.raises(ValueError, match=r"args\[1\]\['how'\] is 'fast', no array; close over it"):
        jaxckpt.measure(lambda x, options: x, X, {"how": "fast"})


def test_equinox_modules():
    eqx = pytest.importorskip("equinox")
    linear = eqx.nn.Linear(256, 256, use_bias=False, key=jax.random.key(0))
    loss = lambda linear, x: jax.vmap(linear)(x).sum()
    plain = jaxckpt.measure(loss, linear, X)
    assert plain.argument_bytes == 2 * SIZE
    assert jaxckpt.measure(eqx.filter_jit(loss), linear, X).peak_bytes == plain.peak_bytes
    assert jaxckpt.measure(eqx.filter_grad(loss), linear, X).output_bytes == SIZE
    with pytest.raises(ValueError, match="cannot see which arguments it donates"):
        add = eqx.filter_jit(lambda x: x + 1, donate="all")
        jaxckpt.measure(add, X)
    mlp = eqx.nn.MLP(4, 4, 4, 2, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"args\[0\]\.activation is .*equinox\.partition"):
        jaxckpt.measure(eqx.filter_jit(loss), mlp, X)


def test_text_is_a_small_table():
    text = str(jaxckpt.measure(lambda x: x @ x, X))
    assert text.splitlines()[0].startswith("memory of one step on local (XLA cpu")
    for name in ("peak", "arguments", "outputs", "temporaries", "FLOPs", "buffers"):
        assert name in text
    assert "host" not in text, "it holds nothing"
