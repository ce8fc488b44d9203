"""The models that several benchmarks run: Qwen3-0.6B's shape, and one for trying a benchmark."""

from jaxckpt.models.config import TransformerConfig

QWEN3 = TransformerConfig(
    vocab_size=151936,
    num_blocks=28,
    d_model=1024,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    d_ff=3072,
)
TINY = TransformerConfig(num_blocks=4)
