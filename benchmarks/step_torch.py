"""The PyTorch side: one training step of Qwen3, made fast by PyTorch's usual means.

    python -m benchmarks.step_torch '{"batch_size": 8, "seq_len": 1024, "mode": "compile"}'

The step has Hugging Face's model, flash attention by SDPA, fused AdamW in float32, clipping by the
global norm, and a linear cross entropy in chunks, which computes its gradients in the forward pass.
Needs the `peer` extra and an NVIDIA GPU. Prints one JSON line.

`mode` is `compile` or `eager`. `checkpoint` turns on Hugging Face's gradient checkpointing.
`budget` sets torch.compile's activation memory budget. `precision` is `autocast` or `copies`.
`autocast` has float32 parameters under `torch.autocast`, as Hugging Face's trainer does for
bfloat16. `copies` has a bfloat16 model and float32 master weights, and needs less memory.
"""

# The `peer` extra is only installed on a machine with a GPU.
# pyright: reportMissingImports=false
import dataclasses
import json
import statistics
import sys
import time
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3Model

from benchmarks.cases import QWEN3
from experiments.files import versions

_CHUNK_TOKENS = 1024
_WARM_UP, _BLOCKS, _STEPS = 3, 5, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A step of Qwen3-0.6B's shape; with `prepare` it is only compiled."""

    batch_size: int
    seq_len: int
    mode: str = "compile"
    checkpoint: bool = False
    budget: float | None = None
    precision: str = "autocast"
    prepare: bool = False


def make_model(case: Case) -> Qwen3Model:
    """Returns the backbone on the GPU, in the dtype of the parameters."""
    config = Qwen3Config(
        vocab_size=QWEN3.vocab_size,
        hidden_size=QWEN3.d_model,
        intermediate_size=QWEN3.d_ff,
        num_hidden_layers=QWEN3.num_blocks,
        num_attention_heads=QWEN3.num_heads,
        num_key_value_heads=QWEN3.num_kv_heads,
        head_dim=QWEN3.head_dim,
        max_position_embeddings=max(case.seq_len, 2048),
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    dtype = torch.float32 if case.precision == "autocast" else torch.bfloat16
    model = Qwen3Model(config).to("cuda", dtype).train()
    if case.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def chunk(x, table, targets, scale):
    """Returns a chunk's loss, and the gradients of `x` and of the logits."""
    logits = torch.mm(x, table.t(), out_dtype=torch.float32)
    lse = logits.logsumexp(dim=-1)
    loss = (lse - logits.gather(1, targets[:, None])[:, 0]).sum() * scale
    grad = (logits - lse[:, None]).exp()
    columns = torch.arange(logits.shape[1], device=logits.device)
    grad = ((grad - (columns == targets[:, None]).float()) * scale).to(x.dtype)
    return loss, torch.mm(grad, table), grad


class ChunkedLoss(torch.autograd.Function):
    """Mean cross entropy of `x @ table.T`; its gradients are made in the forward pass."""

    body = staticmethod(chunk)

    @staticmethod
    def forward(ctx, x, table, targets):
        """Returns the loss and keeps both gradients."""
        scale = 1.0 / x.shape[0]
        grad_table = torch.zeros(table.shape, dtype=torch.float32, device=x.device)
        grads, total = [], torch.zeros([], device=x.device)
        for start in range(0, x.shape[0], _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            loss, grad_x, grad = ChunkedLoss.body(x[rows], table, targets[rows], scale)
            # Summed in float32 by the product itself, in place.
            torch.addmm(grad_table, grad.t(), x[rows], out_dtype=torch.float32, out=grad_table)
            total += loss
            grads.append(grad_x)
        ctx.save_for_backward(torch.cat(grads), grad_table)
        return total

    @staticmethod
    def backward(ctx, grad):
        """Returns the kept gradients times the loss's cotangent `grad`."""
        of_x, of_table = ctx.saved_tensors
        return of_x * grad.to(of_x.dtype), (of_table * grad).to(of_x.dtype), None


class Trainer:
    """The model, its optimizer and, for a bfloat16 model, its float32 master weights."""

    def __init__(self, case: Case):
        torch.backends.cuda.enable_math_sdp(False)  # a slow path is an error, not a surprise
        self.model = make_model(case)
        self.params = list(self.model.parameters())
        self.autocast = case.precision == "autocast"
        self.masters = self.params
        if not self.autocast:
            self.masters = [param.detach().float() for param in self.params]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.forward = self.model
        if case.mode == "compile":
            if case.budget is not None:
                import torch._functorch.config as functorch

                functorch.activation_memory_budget = case.budget
            self.forward = torch.compile(self.model)
            ChunkedLoss.body = staticmethod(torch.compile(chunk))

    def step(self, tokens):
        """Trains on one batch; returns the loss."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
            x = self.forward(input_ids=tokens[:, :-1]).last_hidden_state
        x, targets = x.to(torch.bfloat16), tokens[:, 1:].reshape(-1)
        table = self.model.embed_tokens.weight.to(torch.bfloat16)
        loss = ChunkedLoss.apply(x.reshape(-1, x.shape[-1]), table, targets)
        loss.backward()
        if not self.autocast:
            for master, param in zip(self.masters, self.params, strict=True):
                master.grad, param.grad = param.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not self.autocast:
            with torch.no_grad():
                torch._foreach_copy_(self.params, self.masters)
        return loss.detach()


def run(case: Case) -> dict[str, Any]:
    """Returns the seconds of a step, the peak of allocated memory, and the loss."""
    started = time.perf_counter()
    trainer = Trainer(case)
    shape = (case.batch_size, case.seq_len + 1)
    tokens = torch.randint(0, QWEN3.vocab_size, shape, device="cuda")
    for _ in range(1 if case.prepare else _WARM_UP):
        loss = trainer.step(tokens)
    torch.cuda.synchronize()
    if case.prepare:
        return {}
    compile_seconds = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(_BLOCKS):
        started = time.perf_counter()
        for _ in range(_STEPS):
            loss = trainer.step(tokens)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / _STEPS)
    return {
        "seconds": statistics.median(seconds),
        "seconds_of_blocks": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "compile_seconds": compile_seconds,
        "loss": float(loss),
        "versions": versions(("torch", "transformers")),
        "device": torch.cuda.get_device_name(),
    }


if __name__ == "__main__":
    print(json.dumps(run(Case(**json.loads(sys.argv[1])))))
