"""Makes `golden/`: tiny random Qwen3s as transformers saves them, with its logits and gradients.

    pip install -e ".[experiments,parity]" && python tests/parity/make_golden.py

Weights and sizes are such that no part can be left out unseen: scales of norms are not one, heads
are grouped, their number times their size is not the width, and neither theta nor epsilon is a
default.
"""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
LENGTHS = (2, 9, 24)
ROWS = 2
SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(tied: bool):
    """Writes one folder: the checkpoint, and `golden.npz`."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(int(tied))
    config = Qwen3Config(**SIZES, tie_word_embeddings=tied, attn_implementation="eager")
    model = Qwen3ForCausalLM(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.3 * noise)
    folder = GOLDEN / ("tied" if tied else "untied")
    model.save_pretrained(folder)
    found = {}
    for length in LENGTHS:
        tokens = torch.randint(SIZES["vocab_size"], (ROWS, length + 1))
        logits = model(tokens[:, :-1]).logits
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        found[f"{length}/tokens"] = tokens.numpy().astype(np.int32)
        found[f"{length}/logits"] = logits.detach().numpy()
        for name, parameter in model.named_parameters():
            found[f"{length}/{name}"] = parameter.grad.numpy().copy()
    np.savez_compressed(folder / "golden.npz", **found)


if __name__ == "__main__":
    for tied in (True, False):
        make(tied)
