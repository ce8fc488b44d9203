"""cuDNN's attention, traced where cuDNN is not installed; nothing is compiled or run."""

import functools

import jax
import pytest


def trace_cudnn(monkeypatch):
    """Makes JAX take a current cuDNN for installed, for as long as a test runs."""
    kernel = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(kernel, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(kernel, "is_cuda_compute_capability_equal", lambda _: False)


attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
causal = functools.partial(attention, is_causal=True)
