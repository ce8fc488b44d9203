"""Makes `golden/`: tiny random Qwen3s as transformers saves them, with its logits and gradients.

    pip install -e ".[experiments,parity]" && python tests/parity/make_golden.py

Weights and sizes are such that no part can be left out unseen: scales of norms are not one, heads
are grouped, their number times their size is not the width, and neither theta nor epsilon is a
default.

Random weights can be ill-conditioned: a change by 6e-8, float32's rounding, moved a gradient of one
draw by 1e-5 of its largest value. No two programs agree on such a draw, so it is drawn again.
"""

import copy
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
LENGTHS = (2, 9, 24)
ROWS = 2
ROUNDING = 6e-8  # of float32, both ways
MOST_MOVED = 5e-6  # half the tolerance
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
    for seed in range(100):
        model, batches = draw(tied, seed)
        found = {length: compute(model, tokens) for length, tokens in batches.items()}
        if max(moved(model, batches[length], found[length]) for length in LENGTHS) < MOST_MOVED:
            break
    else:
        raise SystemExit("every draw is ill-conditioned; smaller weights are needed")
    folder = GOLDEN / ("tied" if tied else "untied")
    model.save_pretrained(folder)
    flat = {f"{n}/{name}": value for n, values in found.items() for name, value in values.items()}
    np.savez_compressed(folder / "golden.npz", **flat)


def draw(tied: bool, seed: int):
    """Returns a random model and, by length, random tokens `[ROWS, length + 1]`."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(**SIZES, tie_word_embeddings=tied, attn_implementation="eager")
    model = Qwen3ForCausalLM(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.2 * noise)
    draw_tokens = lambda length: torch.randint(SIZES["vocab_size"], (ROWS, length + 1))
    return model, {length: draw_tokens(length) for length in LENGTHS}


def compute(model, tokens) -> dict[str, np.ndarray]:
    """Returns tokens, logits and, by its parameter's name, every gradient of the mean loss."""
    import torch

    logits = model(tokens[:, :-1]).logits
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    tokens = tokens.numpy().astype(np.int32)
    return {"tokens": tokens, "logits": logits.detach().numpy(), **gradients}


def moved(model, tokens, found: dict[str, np.ndarray]) -> float:
    """Returns by how much of its largest value a tensor moves as every weight is rounded anew."""
    import torch

    worst = 0.0
    for _ in range(8):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1 + ROUNDING * (2 * torch.rand_like(parameter) - 1))
        got = compute(other, tokens)
        errors = [np.abs(got[n] - value).max() / np.abs(value).max() for n, value in found.items()]
        worst = max(worst, *errors)
    return worst


if __name__ == "__main__":
    for tied in (True, False):
        make(tied)
