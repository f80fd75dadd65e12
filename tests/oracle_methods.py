"""Every method from its formula and torch's own layers, sharing no code with the package.

Each module takes one pair, image ``[M, Di]`` and text ``[N, Dt]``, and returns fused rows ``[N, D]`` and the
attention ``[H, N, M]``, None where there is none. Its ``state_dict`` has the names of our checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusecli.weights import Config, Weights
from tests.oracle import Article


class _Normed(nn.Module):
    """Layer norms in front, if asked for."""

    def __init__(self, text_dim: int, image_dim: int, layer_norm: bool) -> None:
        super().__init__()
        if layer_norm:
            self.text_norm, self.image_norm = nn.LayerNorm(text_dim), nn.LayerNorm(image_dim)

    def forward(self, image: Any, text: Any) -> Any:
        if hasattr(self, "text_norm"):
            image, text = self.image_norm(image), self.text_norm(text)
        return self.fuse(image, text)

    def fuse(self, image: Any, text: Any) -> Any:
        raise NotImplementedError


class NormedArticle(_Normed):
    def __init__(
        self, dim: int, num_heads: int, text_dim: int, image_dim: int, layer_norm: bool, residual: bool = False
    ) -> None:
        super().__init__(text_dim, image_dim, layer_norm)
        self.residual = residual
        article = Article(dim, num_heads, text_dim, image_dim)
        self.text_proj, self.image_proj, self.attention = article.text_proj, article.image_proj, article.attention

    def attend(self, image: Any, text: Any) -> Any:
        fused, weights = Article.forward(self, image, text)  # type: ignore[arg-type]
        return fused, weights

    def fuse(self, image: Any, text: Any) -> Any:
        fused, weights = self.attend(image, text)
        return (text + fused if self.residual else fused), weights


class Gated(NormedArticle):
    def __init__(self, dim: int, *args: Any, gate: str = "sigmoid", **options: Any) -> None:
        super().__init__(dim, *args, **options)
        if gate == "sigmoid":
            self.gate_proj = nn.Linear(2 * dim, dim)
        else:
            self.gamma = nn.Parameter(torch.randn(1))

    def fuse(self, image: Any, text: Any) -> Any:
        seen, weights = self.attend(image, text)
        if hasattr(self, "gamma"):
            return text + torch.tanh(self.gamma) * seen, weights
        gate = torch.sigmoid(self.gate_proj(torch.cat([text, seen], -1)))
        return text + gate * seen, weights


class WeightedSum(_Normed):
    def __init__(self, dim: int, num_heads: int, text_dim: int, image_dim: int, layer_norm: bool) -> None:
        super().__init__(text_dim, image_dim, layer_norm)
        self.text_proj, self.image_proj = nn.Linear(text_dim, dim), nn.Linear(image_dim, dim)
        self.alpha = nn.Parameter(torch.rand(1))

    def fuse(self, image: Any, text: Any) -> Any:
        mean = self.image_proj(image).mean(0)
        return (1 - self.alpha) * self.text_proj(text) + self.alpha * mean, None


class Concat(_Normed):
    def __init__(self, dim: int, num_heads: int, text_dim: int, image_dim: int, layer_norm: bool) -> None:
        super().__init__(text_dim, image_dim, layer_norm)
        self.image_proj, self.concat_proj = nn.Linear(image_dim, dim), nn.Linear(text_dim + dim, dim)

    def fuse(self, image: Any, text: Any) -> Any:
        mean = self.image_proj(image).mean(0).expand(len(text), -1)
        return self.concat_proj(torch.cat([text, mean], -1)), None


class Layer(nn.TransformerDecoderLayer):
    """torch's own layer, with a norm of the memory; without self-attention its sublayers are called one by one."""

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, self_attention: bool) -> None:
        super().__init__(dim, num_heads, dim_feedforward, dropout=0.0, activation="gelu", norm_first=True)
        self.norm_memory = nn.LayerNorm(dim)
        if not self_attention:
            del self.self_attn, self.norm1

    def forward(self, text: Any, image: Any) -> Any:  # type: ignore[override]
        memory = self.norm_memory(image)
        before = text
        if hasattr(self, "self_attn"):
            before = text + self._sa_block(self.norm1(text), None, None)
        seen, weights = self.multihead_attn(self.norm2(before), memory, memory, average_attn_weights=False)
        if hasattr(self, "self_attn"):
            return super().forward(text, memory), weights
        after = before + seen
        return after + self._ff_block(self.norm3(after)), weights


class Transformer(_Normed):
    def __init__(
        self, dim: int, num_heads: int, text_dim: int, image_dim: int, layer_norm: bool,
        num_layers: int = 1, dim_feedforward: int | None = None, self_attention: bool = False, dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(text_dim, image_dim, layer_norm)
        self.text_proj, self.image_proj = nn.Linear(text_dim, dim), nn.Linear(image_dim, dim)
        inside = dim_feedforward or 4 * dim
        self.layers = nn.ModuleList(Layer(dim, num_heads, inside, self_attention) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def fuse(self, image: Any, text: Any) -> Any:
        x, memory, weights = self.text_proj(text), self.image_proj(image), None
        for layer in self.layers:
            x, weights = layer(x, memory)
        return self.norm(x), weights


ORACLES: dict[str, Any] = {
    "attention": NormedArticle,
    "weighted-sum": WeightedSum,
    "concat": Concat,
    "gated": Gated,
    "transformer": Transformer,
}


def oracle(
    method: str, dim: int, num_heads: int, text_dim: int, image_dim: int, seed: int = 0,
    layer_norm: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """A module of ``method``, weights drawn from ``seed``, and the same weights as ours."""
    torch.manual_seed(seed)
    module = ORACLES[method](dim, num_heads, text_dim, image_dim, layer_norm, **options)
    for name, tensor in module.named_parameters():
        if "norm" in name or name.endswith("bias"):  # PyTorch starts them at 0 and 1
            nn.init.normal_(tensor, float("norm" in name and "weight" in name), 0.1)
    module.eval().requires_grad_(False)
    heads: dict[str, Any] = {"num_heads": num_heads} if method not in ("weighted-sum", "concat") else {}
    config = Config(method, **heads, layer_norm=layer_norm, **options)
    return module, Weights(config, {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()})
