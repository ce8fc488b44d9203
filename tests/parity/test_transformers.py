"""What is exported, transformers loads, and computes the same logits with it.

It needs `pip install -e ".[parity]"` and is skipped without.
"""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from experiments.config import TrainConfig
from experiments.weights.load import check_init, load_params, read_shape
from jaxckpt.models import Transformer
from tests.experiments import runs
from tests.parity.make_golden import GOLDEN
from tests.parity.test_golden import TOLERANCE, error

_MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)}"),
]


@pytest.fixture(scope="module", params=["tied", "untied", "drawn"])
def exported(request, tmp_path_factory):
    """A folder that a trained run was exported to; `drawn` did not start from one."""
    from experiments.cli import main
    from experiments.export import export

    base = tmp_path_factory.mktemp(request.param)
    flags = ["--vocab-size=300"]
    if request.param != "drawn":
        folder = GOLDEN / request.param
        flags = [f"--init={folder}", *shape_of(read_shape(folder))]
    (base / "data.bin").write_bytes(np.random.default_rng(0).integers(0, 48, 9999, "uint16"))
    flags += [f"--data={base / 'data.bin'}", "--steps=3", "--save-every=3", f"--out={base / 'run'}"]
    runs.train(*flags, "--dropout=0", cache=base / "cache")
    main(export, [str(base / "run"), f"-o={base / 'out'}", "--dtype=f32", "--shard-gb=2e-5"])
    return base / "out"


def shape_of(model) -> list[str]:
    """Returns flags that keep `runs.TINY` from giving the model another shape."""
    names = [flag.partition("=")[0][2:] for flag in runs.TINY]
    fields = dataclasses.asdict(model)
    found = {name: fields.get(name.replace("-", "_")) for name in names}
    return [f"--{name}={value}" for name, value in found.items() if value and name != "dropout"]


@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_an_export_and_has_the_same_logits(exported):
    import torch
    import transformers

    other, loading = transformers.AutoModelForCausalLM.from_pretrained(
        exported, output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert other.dtype == torch.float32 and type(other).__name__ == "Qwen3ForCausalLM"
    config = TrainConfig(
        init=exported, model=dataclasses.replace(read_shape(exported), dtype="f32")
    )
    check_init(config)
    model = Transformer(config.model, remat="full")
    tokens = np.random.default_rng(1).integers(0, config.model.vocab_size, [2, 17])
    like = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    got = jax.jit(model.apply)({"params": load_params(exported, like)}, tokens)
    with torch.no_grad():
        expected = other(torch.from_numpy(tokens)).logits.numpy()
    assert error(np.asarray(got), expected) < TOLERANCE
