"""What stands for a pair: one vector, from the text, from the image, from both, or from a fusion of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from fusecli.arrays import cast
from fusecli.fusion import Prepared
from fusecli.methods import View
from fusecli.text_rows import PickedRows, TextRows
from fusecli.training.data import Batch, Data, load
from fusecli.weights import Config, Weights

#: Pairs that are computed at once where nothing is learned.
EVALUATED = 256


class Representation(Protocol):
    """Gives a vector for each pair."""

    width: int
    widths: list[int]  # of what lies side by side in a vector
    device: str

    def encode(self, batch: Batch) -> torch.Tensor:
        """Vectors ``[B, width]`` of the pairs of a batch."""

    def encode_images(self, batch: Batch, times: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Gives vectors ``[B, width]`` of the images of a batch with texts ``[B, N, Dt]`` and their mask.

        It will be called ``times`` times; the texts are about as long as those of the batch.
        """

    def encode_beside(self, data: Data, texts: list[int]) -> Callable[[int], torch.Tensor]:
        """Gives, for an image, its vectors ``[len(texts), width]`` with each text; nothing is learned from them."""


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of the rows of ``x [B, rows, width]`` where ``mask [B, rows]`` is true: ``[B, width]``."""
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Means:
    """Mean rows of text, image, or both side by side."""

    device = "cpu"

    def __init__(self, data: Data, text: bool, image: bool) -> None:
        self._text, self._image = text, image
        self._texts = data.texts.means() if text else None
        self._images = data.images.means() if image else None
        self.widths = [side.width for side, wanted in ((data.texts, text), (data.images, image)) if wanted]
        self.width = sum(self.widths)

    def encode(self, batch: Batch) -> torch.Tensor:
        """See `Representation`."""
        parts = [masked_mean(batch.texts, batch.text_mask)] if self._text else []
        parts += [masked_mean(batch.images, batch.image_mask)] if self._image else []
        return torch.cat(parts, 1)

    def encode_images(self, batch: Batch, times: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """See `Representation`."""
        return lambda texts, mask: self.encode(replace(batch, texts=texts, text_mask=mask))

    def encode_beside(self, data: Data, texts: list[int]) -> Callable[[int], torch.Tensor]:
        """See `Representation`."""
        left = [] if self._texts is None else [self._texts[texts]]

        def give(image: int) -> torch.Tensor:
            right = [] if self._images is None else [self._images[image].expand(len(texts), -1)]
            return torch.cat(left + right, 1)

        return give


def fast_in_bfloat16(device: str) -> bool:
    """Whether a processor has instructions for products in bfloat16, or else they take longer; GPUs are taken to."""
    if device != "cpu":
        return True
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch cannot tell
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


class Fusion:
    """The mean of the fused tokens.

    Args:
        weights: to begin with; learned further if ``learned``.
        device: where to compute.
        learned: whether gradients are wanted.
        bfloat16: multiply matrices in bfloat16 where gradients are taken.
    """

    def __init__(self, weights: Weights, device: str = "cpu", learned: bool = True, bfloat16: bool = False) -> None:
        self.device, self._learned, self._bfloat16 = device, learned, bfloat16
        self.config: Config = weights.config
        self.named = {
            name: nn.Parameter(torch.tensor(cast(tensor, "float32"), device=device), requires_grad=learned)
            for name, tensor in weights.tensors.items()
        }
        self.width = weights.dim
        self.widths = [self.width]
        self._drop: float = 0.0
        self._weights = Weights(self.config, self.named)
        self._frozen: Weights | None = None

    def parameters(self) -> list[nn.Parameter]:
        """What there is to learn."""
        return list(self.named.values())

    @contextmanager
    def training(self) -> Iterator[None]:
        """Here weights change, and dropout is at work."""
        self._frozen = None
        self._drop = self.config.dropout if self.config.method == "transformer" else 0.0
        try:
            yield
        finally:
            self._drop = 0.0

    def encode(self, batch: Batch) -> torch.Tensor:
        """See `Representation`."""
        return self.encode_images(batch, 1)(batch.texts, batch.text_mask)

    def encode_images(self, batch: Batch, times: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """See `Representation`."""
        prepared = self._prepared(batch, times)

        def give(texts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            with self._narrow():
                fused = prepared.fuse(texts, mask=mask).fused
            return masked_mean(fused.float(), mask)

        return give

    def _prepared(self, batch: Batch, times: int = 1) -> Prepared:
        """The images of a batch, ready for as many texts as it has, ``times`` over."""
        drop = partial(nn.functional.dropout, p=self._drop) if self._drop else lambda x: x
        n = batch.texts.shape[1] * times
        learning = self._learning
        weights = self._weights if learning else self.frozen()
        image, mask = batch.images, batch.image_mask
        with self._narrow():
            return Prepared(View(weights, image, batch.texts, n, "float32", training=learning, mask=mask, drop=drop))

    def _narrow(self) -> torch.autocast:
        """What is learned computes products in bfloat16, whose range is that of float32: no loss has to be scaled.

        torch leaves some of what follows products in bfloat16. Means, heads and losses are outside: there the third
        digit of a cosine counts.
        """
        kind = self.device.partition(":")[0]
        return torch.autocast(kind, torch.bfloat16, enabled=self._bfloat16 and self._learning)

    @property
    def _learning(self) -> bool:
        return self._learned and torch.is_grad_enabled()

    def frozen(self) -> Weights:
        """The weights as they are now, of which nothing is learned: they are folded, and take fewer operations."""
        if self._frozen is None:
            self._frozen = Weights(self.config, {name: tensor.detach() for name, tensor in self.named.items()})
        return self._frozen

    def each(self, batch: Batch, which: torch.Tensor) -> torch.Tensor:
        """Vectors ``[B, G, width]`` of each image of a batch with the texts ``which [B, G]`` of the batch.

        Images and texts are projected once; those of an image follow one another as one long text.
        """
        if self.config.self_attention:  # texts that follow one another would see each other
            columns = [replace(batch, texts=batch.texts[at], text_mask=batch.text_mask[at]) for at in which.mT]
            return torch.stack([self.encode(column) for column in columns], 1)
        size, count = which.shape

        def pick(rows: torch.Tensor) -> torch.Tensor:
            picked = nn.functional.embedding(which, rows.flatten(1))  # adds up gradients in one order, on a GPU too
            return picked.reshape(size, -1, rows.shape[-1])  # [B, G*N, width]

        mask = batch.text_mask[which]  # [B, G, N]
        prepared = self._prepared(batch, count)
        with self._narrow():
            texts = PickedRows(prepared.text_rows(batch.texts), pick)
            fused = prepared.fuse(texts, mask=mask.flatten(1)).fused  # [B, G*N, D]
        fused = fused.float().reshape(size * count, -1, self.width)
        return masked_mean(fused, mask.flatten(0, 1)).reshape(size, count, -1)

    def encode_beside(self, data: Data, texts: list[int]) -> Callable[[int], torch.Tensor]:
        """See `Representation`."""
        frozen = self.frozen()
        rows = torch.cat([torch.from_numpy(data.texts[at]).float() for at in texts]).to(self.device)
        lengths = torch.tensor([data.texts.length(at) for at in texts])

        known: dict[tuple[int, int], TextRows] = {}  # blocks, by where they begin and end

        def give(image: int) -> torch.Tensor:
            prepared = Prepared(View(frozen, torch.from_numpy(data.images[image]).float(), rows, len(rows), "float32"))
            parts = []
            for block in prepared.blocks():
                if (at := (block.start, block.stop)) not in known:
                    known[at] = prepared.text_rows(rows[block])
                parts.append(prepared.fuse(known[at]).fused)
            return torch.segment_reduce(torch.cat(parts), "mean", lengths=lengths.to(self.device))

        def give_apart(image: int) -> torch.Tensor:
            parts = [texts[at : at + EVALUATED] for at in range(0, len(texts), EVALUATED)]
            return torch.cat([self.encode(load(data, some, [image] * len(some)).to(self.device)) for some in parts])

        return give_apart if self.config.self_attention else give

    def snapshot(self) -> Weights:
        """The weights as they are now, as NumPy arrays."""
        return Weights(self.config, {name: tensor.detach().cpu().numpy().copy() for name, tensor in self.named.items()})

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over saved weights."""
        self._frozen = None
        with torch.no_grad():
            for name, tensor in self.named.items():
                tensor.copy_(tensors[name])
