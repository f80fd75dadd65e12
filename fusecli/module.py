"""`ImageTextFusion`, the article's module, as a drop-in for `torch.nn`."""

from __future__ import annotations

import torch
from torch import nn

from fusecli.arrays import compute_dtype
from fusecli.fusion import Seen, as_rows
from fusecli.methods import View
from fusecli.weights import Config, Weights


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
        self.text_proj = nn.Linear(text_dim or feature_dim, feature_dim)
        self.image_proj = nn.Linear(image_dim or feature_dim, feature_dim)
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
        compute_dtype(image_feat, text_feat)  # the result takes the text's dtype, and integers would cut it off
        tensors = dict(self.named_parameters(remove_duplicate=False))  # layers may be one and the same
        weights = Weights(Config(num_heads=self.attention.num_heads), tensors)
        dtype = str(self.text_proj.weight.dtype).removeprefix("torch.")
        image = as_rows(image_feat, "image", weights.image_dim)
        text = as_rows(text_feat, "text", weights.text_dim)
        seen = Seen(View(weights, image, text, len(text), dtype, training=True))
        return seen.meet(text).fused.to(text_feat.dtype)  # type: ignore[no-any-return]
