"""The peer: GPT-2 as a good PyTorch user would train it, in the style of nanoGPT, on one device.

Fused attention (cuDNN's first, then FlashAttention), bfloat16 by autocast, fused AdamW, clipping, tied embeddings, a
vocabulary padded to a multiple of 128, TF32 for what stays float32. The function is GPT-2's: tanh GELU, biases.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]  # an extra
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.attn_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Any) -> Any:
        B, T, D = x.shape
        q, k, v = (
            part.view(B, T, self.heads, D // self.heads).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).split(D, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, layers: int, heads: int, width: int, positions: int, vocabulary: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Any, targets: Any) -> Any:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def make_step(
    shape: tuple[int, int, int, int, int], batch: int, *, compiled: bool, dtype: Any = None
) -> tuple[Callable[[int], None], Callable[[], float]]:
    """Returns (run, peak_gib): run(n) takes n training steps and waits for the last; peak_gib() tells their memory.

    shape: layers, heads, width, positions, padded vocabulary. dtype: of products; None means bfloat16 on a GPU, float32
    on a CPU.
    """
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    dtype = dtype or (torch.bfloat16 if cuda else torch.float32)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = GPT(*shape).to(device)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(shape[-1], (batch, shape[3] + 1), device=device)
    forward: Any = torch.compile(model) if compiled else model

    def run(steps: int) -> None:
        for _ in range(steps):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32), fused_attention(cuda):
                loss = forward(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()

    return run, lambda: torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def fused_attention(cuda: bool) -> Any:
    """Returns a context in which attention is cuDNN's, or FlashAttention where cuDNN cannot."""
    if not cuda:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]

    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)
