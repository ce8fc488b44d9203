"""Meshes as text: what is parsed, and what is refused in one line before JAX is imported."""

import re
import subprocess
import sys

import pytest

from jaxckpt.models import TransformerConfig
from jaxckpt.models.mesh import MeshError, MeshShape

MODEL = TransformerConfig(num_heads=8, num_kv_heads=4, d_model=64, d_ff=96, vocab_size=64)


def test_text_and_shape():
    shape = MeshShape.parse(" fsdp=4, data=2 ")
    assert (shape.sizes, shape.size, shape.batch_parts) == ((2, 4, 1), 8, 8)
    assert MeshShape.parse(str(shape)) == shape
    shape.check(MODEL, batch_size=16, accumulate=2)


@pytest.mark.parametrize(
    "text, message",
    [
        ("fdsp=4", "mesh 'fdsp=4' has no axis 'fdsp' (did you mean 'fsdp'?); valid: data, fsdp,"),
        ("fsdp", "'fsdp' is no axis=size; as data=2,fsdp=4,tensor=2"),
        ("", "'' is no axis=size"),
        ("fsdp=4,", "'' is no axis=size"),
        ("fsdp=2,fsdp=2", "names axis fsdp twice"),
        ("data=two", "size 'two' of data is no whole number"),
        ("data=-1", "size '-1' of data is no whole number"),
        ("data=0", "mesh axis data is 0; the least is 1"),
    ],
)
def test_what_is_no_mesh(text, message):
    with pytest.raises(MeshError, match=re.escape(message)):
        MeshShape.parse(text)


@pytest.mark.parametrize(
    "text, batch, parts, message",
    [
        ("data=3", 8, 1, "data times fsdp is 3, which does not divide batch_size 8; valid: 1, 2,"),
        ("fsdp=8", 8, 2, "does not divide batch_size 8 in 2 parts of 4; valid: 1, 2, 4"),
        ("tensor=8", 8, 1, "tensor 8 does not divide num_kv_heads 4; valid: 1, 2, 4"),
        ("fsdp=3", 3, 1, "fsdp 3 does not divide d_model 64; valid: 1, 2, 4, 8, 16, 32, 64"),
    ],
)
def test_what_cannot_be_cut(text, batch, parts, message):
    with pytest.raises(MeshError, match=re.escape(message)):
        MeshShape.parse(text).check(MODEL, batch, parts)


def test_another_number_of_devices():
    with pytest.raises(MeshError, match=r"is of 4 devices; target v5e-1 has 1 device$"):
        MeshShape.parse("fsdp=4").check_devices(1, "target v5e-1")


def test_needs_no_jax():
    code = "import sys, jaxckpt.models.mesh; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
