"""`ImageTextFusion`, the article's module, as a drop-in for `torch.nn`."""

from __future__ import annotations

import torch
from torch import nn

from fusecli.attention import attend, prepare
from fusecli.fusion import as_rows
from fusecli.maps import unfolded
from fusecli.plans import DIRECT


class ImageTextFusion(nn.Module):
    """Let text tokens attend to image features.

    The same constructor, call, ``state_dict`` keys and numbers as the article's class; the same seed gives the
    same initial weights. The image is not repeated ``N`` times, because N copies of one key are one key.

    Args:
        feature_dim: ``D``, a multiple of ``num_heads``.
        num_heads: ``H``.
        text_dim, image_dim: ``Dt`` and ``Di`` where they differ from ``D``.
    """

    def __init__(
        self,
        feature_dim: int = 768,
        num_heads: int = 8,
        *,
        text_dim: int | None = None,
        image_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.text_proj = nn.Linear(feature_dim if text_dim is None else text_dim, feature_dim)
        self.image_proj = nn.Linear(feature_dim if image_dim is None else image_dim, feature_dim)
        self.attention = nn.MultiheadAttention(feature_dim, num_heads)

    def forward(self, image_feat: torch.Tensor, text_feat: torch.Tensor) -> torch.Tensor:
        """Fuse one pair.

        Args:
            image_feat: ``[M, Di]`` (``[1, Di]`` in the article).
            text_feat: ``[N, Dt]``.

        Returns:
            ``[N, D]``, in the text's dtype.

        Raises:
            ShapeError: an array has other axes, no rows or the wrong width.
            ValuesError: an array is not of a floating dtype.
        """
        rows = as_rows(image_feat, "image", _width(self.image_proj, image_feat))
        text = as_rows(text_feat, "text", _width(self.text_proj, text_feat))
        attention, usual = self.attention, _is_usual(self.attention)
        dtype = attention.out_proj.weight.dtype if usual else _dtype(attention, text.dtype)
        # Layers are called, and parameters taken by name: what has been put in their place works here too.
        query = self.text_proj(text.to(_dtype(self.text_proj, dtype))).to(dtype)  # [N, D]
        memory = self.image_proj(rows.to(_dtype(self.image_proj, dtype))).to(dtype)  # [M, D]
        if not usual:
            batch = 0 if getattr(attention, "batch_first", False) else 1
            memory = memory.unsqueeze(batch)  # [M, 1, D]
            attended = attention(query.unsqueeze(batch), memory, memory)  # [N, 1, D], and the weights if it has some
            attended = attended[0] if isinstance(attended, tuple) else attended
            return attended.squeeze(batch).to(text_feat.dtype)  # type: ignore[no-any-return]
        in_proj = attention.in_proj_weight, _bias(attention.in_proj_bias, attention.in_proj_weight)
        out_proj = attention.out_proj.weight, _bias(attention.out_proj.bias, attention.out_proj.weight)
        maps = unfolded(in_proj, out_proj, attention.num_heads)
        fused, _ = attend(query, prepare(memory, maps, attention.num_heads, DIRECT))
        return fused.to(text_feat.dtype)  # type: ignore[no-any-return]


def _is_usual(attention: nn.Module) -> bool:
    """Whether a layer does what `attend` does; one with dropout, or hooks, keys or code of its own, is called."""
    if (
        "forward" in vars(attention)
        or not isinstance(attention, nn.MultiheadAttention)
        or type(attention).forward is not nn.MultiheadAttention.forward
    ):
        return False
    heard = any(getattr(attention, name, None) for name in HOOKS)
    keys = attention.bias_k is not None or attention.add_zero_attn or attention.in_proj_weight is None
    return not (heard or keys or (attention.training and attention.dropout))


#: Where a module keeps what is to be told of its calls.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _width(layer: nn.Module, features: torch.Tensor) -> int:
    """What a projection takes, as far as it says so (a lazy one says 0 until it is called)."""
    return int(getattr(layer, "in_features", 0)) or (features.shape[-1] if features.ndim else 0)


def _dtype(layer: nn.Module, other: torch.dtype) -> torch.dtype:
    """What a projection computes in, or the ``other`` where it has no weights to tell."""
    return next((weight.dtype for weight in layer.parameters() if weight.is_floating_point()), other)


def _bias(bias: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    return weight.new_zeros(len(weight)) if bias is None else bias
