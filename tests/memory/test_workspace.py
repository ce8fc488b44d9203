"""The buffer of cuDNN's attention that a compiler without a GPU leaves out."""

import jax
import pytest
from jax.interpreters import mlir
from jaxlib.mlir import ir

from jaxckpt.memory import workspace

_CALL = """
func.func @main(%q: tensor<{q}xbf16>, %k: tensor<{k}xbf16>) -> tensor<{q}xbf16> {{
  %0:4 = stablehlo.custom_call @__cudnn${name}(%q, %k) {{api_version = 2 : i32}} :
    (tensor<{q}xbf16>, tensor<{k}xbf16>) ->
    (tensor<{q}xbf16>, tensor<{k}xbf16>, tensor<{k}xbf16>, tensor<0xui8>)
  return %0#0 : tensor<{q}xbf16>
}}
"""


def text_after(name: str, q: str, k: str) -> str:
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        module = ir.Module.parse(_CALL.format(name=name, q=q, k=k))
        workspace.reserve(module)
        assert module.operation.verify()
        return str(module)


@pytest.mark.parametrize("name", ["fmhaSoftmaxBackward", "fmhaScaleBiasSoftmaxDropoutBackward"])
def test_a_backward_kernel_gets_its_buffer(name):
    equal = text_after(name, "2x4x64x16", "2x4x32x16")
    assert f"tensor<{4 * 2 * 4 * 64 * (16 + 1)}xui8>" in equal and "<0xui8>" not in equal


def test_shared_key_heads_take_more():
    expected = 4 * 2 * 4 * 64 * (16 + 1) + 2 * 2 * 2 * 4 * 32 * 16
    assert f"tensor<{expected}xui8>" in text_after("fmhaSoftmaxBackward", "2x4x64x16", "2x1x32x16")


@pytest.mark.parametrize("name", ["fmhaSoftmax", "fmhaSoftmaxBackwardF8"])
def test_other_kernels_are_left_alone(name):
    assert "<0xui8>" in text_after(name, "2x4x64x16", "2x4x32x16")


def test_a_step_without_the_kernel_is_left_alone():
    lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((4, 4), "float32"))
    before = lowered.as_text()
    workspace.reserve(lowered.compiler_ir())
    assert lowered.as_text() == before
