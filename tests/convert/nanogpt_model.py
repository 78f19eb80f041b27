"""nanoGPT's function in torch, written from its definition: names of modules, exact GELU, AdamW's groups, checkpoint.

Since May 2023 its MLP is nn.GELU(), the exact form. LayerNorm has epsilon 1e-5 and an optional bias, and so has every
linear layer except the head, which is the token embedding. The loss is the mean cross-entropy over all positions.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

ARGS = {"block_size": 8, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": True, "dropout": 0.0}
SETTINGS = {"learning_rate": 6e-4, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0}
CONFIG: Mapping[str, Any] = {"dataset": "x"}  # of train.py, as far as a test needs it
APPROXIMATE = {"gelu": "none", "gelu_new": "tanh"}


class Norm(torch.nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.bias = torch.nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Any) -> Any:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


def make_block(D: int, bias: bool) -> Any:
    linear = lambda rows, columns: torch.nn.Linear(columns, rows, bias=bias)  # noqa: E731
    attention = torch.nn.ModuleDict({"c_attn": linear(3 * D, D), "c_proj": linear(D, D)})
    mlp = torch.nn.ModuleDict({"c_fc": linear(4 * D, D), "c_proj": linear(D, 4 * D)})
    return torch.nn.ModuleDict({"ln_1": Norm(D, bias), "attn": attention, "ln_2": Norm(D, bias), "mlp": mlp})


class Model(torch.nn.Module):
    """Parameters named and tied as nanoGPT's are. activation: gelu_new is what it computed before May 2023."""

    def __init__(self, args: dict[str, Any], activation: str = "gelu") -> None:
        super().__init__()
        D, V, bias = args["n_embd"], args["vocab_size"], args["bias"]
        self.heads, self.approximate = args["n_head"], APPROXIMATE[activation]
        self.transformer = torch.nn.ModuleDict({
            "wte": torch.nn.Embedding(V, D),
            "wpe": torch.nn.Embedding(args["block_size"], D),
            "h": torch.nn.ModuleList([make_block(D, bias) for _ in range(args["n_layer"])]),
            "ln_f": Norm(D, bias),
        })  # fmt: skip
        self.lm_head = torch.nn.Linear(D, V, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, tokens: Any, targets: Any) -> tuple[Any, Any]:
        """Returns (logits, loss) of int64 tokens and targets [B, T]."""
        parts = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](torch.arange(tokens.shape[1]))
        for block in parts["h"]:
            x = x + self._attend(block["attn"], block["ln_1"](x))
            hidden = F.gelu(block["mlp"]["c_fc"](block["ln_2"](x)), approximate=self.approximate)
            x = x + block["mlp"]["c_proj"](hidden)
        logits = self.lm_head(parts["ln_f"](x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _attend(self, attention: Any, x: Any) -> Any:
        B, T, D = x.shape
        q, k, v = (
            part.view(B, T, self.heads, D // self.heads).transpose(1, 2)
            for part in attention["c_attn"](x).split(D, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attention["c_proj"](y.transpose(1, 2).reshape(B, T, D))


def make_optimizer(model: Any, settings: dict[str, float] = SETTINGS) -> Any:
    """Two groups: matrices and tables decay, vectors do not; a tied parameter is there once."""
    parameters = [p for _, p in model.named_parameters() if p.requires_grad]
    decay, rest = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": settings["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings["learning_rate"], betas=(settings["beta1"], settings["beta2"]))


def train(model: Any, optimizer: Any, batches: Any, *, grad_clip: float = SETTINGS["grad_clip"]) -> list[float]:
    """Takes a step for each of `batches`, int64 [steps, B, T + 1], at the optimizer's rate; returns the losses."""
    losses = []
    for tokens in torch.as_tensor(batches):
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def save(
    path: pathlib.Path,
    model: Any,
    args: dict[str, Any],
    prefix: str = "",
    *,
    optimizer: Any = None,
    iter_num: int = 7,
    config: Mapping[str, Any] = CONFIG,
    **more: Any,
) -> None:
    """Writes ckpt.pt. more: further tensors, by their names without `prefix`."""
    state = {prefix + name: tensor for name, tensor in (model.state_dict() | more).items()}
    optimizer = optimizer or make_optimizer(model)
    saved = {"model": state, "optimizer": optimizer.state_dict(), "model_args": args, "iter_num": iter_num}
    torch.save(saved | {"best_val_loss": torch.tensor(2.5), "config": dict(config)}, path)
