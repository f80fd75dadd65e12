"""The reference, written from the article alone: torch's own layers and the literal repeat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fusecli.functional import multiplies_in_place
from fusecli.machine import BLAS_THREADS
from fusecli.weights import Config, Weights


class Article(nn.Module):
    """The article's ``ImageTextFusion``, with widths that may differ."""

    def __init__(self, dim: int, num_heads: int, text_dim: int | None = None, image_dim: int | None = None) -> None:
        super().__init__()
        self.text_proj = nn.Linear(text_dim or dim, dim)
        self.image_proj = nn.Linear(image_dim or dim, dim)
        self.attention = nn.MultiheadAttention(dim, num_heads)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(image) == 1:
            image = image.repeat(len(text), 1)
        query = self.text_proj(text).unsqueeze(1)
        key = self.image_proj(image).unsqueeze(1)
        fused, weights = self.attention(query, key, key, average_attn_weights=False)
        return fused.squeeze(1), weights[0]


def article(
    dim: int, num_heads: int, text_dim: int | None = None, image_dim: int | None = None, seed: int = 0
) -> Article:
    """An article module with weights and biases drawn from ``seed`` (PyTorch itself starts some biases at 0)."""
    torch.manual_seed(seed)
    module = Article(dim, num_heads, text_dim, image_dim)
    for bias in (module.attention.in_proj_bias, module.attention.out_proj.bias):
        nn.init.normal_(bias, std=0.1)
    return module.eval().requires_grad_(False)


def weights_of(module: Article, **options: Any) -> Weights:
    """The module's weights as ours (NumPy)."""
    tensors = {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}
    return Weights(Config(num_heads=module.attention.num_heads, **options), tensors)


def features(rng: np.random.Generator, rows: int, width: int, norm: float = 1.0, shared: float = 0.0) -> Any:
    """Drawn float32 features of a given norm; ``shared`` is how much all rows have in common."""
    x = rng.standard_normal((rows, width)) + shared * rng.standard_normal(width)
    return (norm * x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def both_precisions(module: Article, image: Any, text: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """(fused, attention) of the article in float64 and in float32."""
    x, y = torch.from_numpy(image), torch.from_numpy(text)
    single = tuple(t.numpy() for t in module.float()(x, y))
    exact = tuple(t.numpy() for t in module.double()(x.double(), y.double()))
    module.float()
    return exact, single


def assert_as_good(ours: Any, exact: Any, single: Any) -> None:
    """Our error is at most twice that of the article's code in float32, plus 1e-6."""
    allowed = 2 * abs(single - exact).max() + 1e-6
    error = abs(np.asarray(ours, np.float64) - exact).max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@contextmanager
def in_torch() -> Iterator[None]:
    """Here torch computes for tensors on the CPU too, as it does on CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusecli.fusion.numpy_can_have", lambda *arrays: False)
        yield


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Here NumPy multiplies as it does in the command, on one thread (what it says of their number is believed)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BLAS_THREADS, "1")
        multiplies_in_place.cache_clear()
        try:
            yield
        finally:
            multiplies_in_place.cache_clear()


#: What makes an array of NumPy's one of each kind, and where that kind is computed with.
KINDS = ((np.asarray, nullcontext), (np.asarray, on_one_thread), (torch.from_numpy, in_torch))
