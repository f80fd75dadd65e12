"""What is learned without labels: which picture belongs to a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from fusecli.errors import ValuesError
from fusecli.training.data import MOST_ROWS, Batch, Data, batches, cut, load
from fusecli.training.objective import Evaluation, Head, one_thread, usual_spread
from fusecli.training.represent import EVALUATED, Fusion, Representation, masked_mean

#: Share of the vectors that the head does not see in training.
DROPOUT = 0.1
#: Strengths of the penalty that a head is tried with, and factors of its cosines; the validation part chooses.
PENALTIES, FACTORS = (0.1, 0.3, 1.0, 3.0), (5.0, 10.0, 20.0, 40.0, 80.0)
#: By how much the first of two parts of a vector varies more than the second (standard deviations): tried likewise, for
#: the penalty is the same in every direction, and the units that features happen to have are not to decide.
BALANCES = (1 / 16, 1.0, 16.0)
#: Images with texts of other pairs from which a head is made, at least; each image is met once in any case.
SAMPLES = 4096
#: Squares of correlations below this share of the largest are rounding; and what keeps from dividing by 0.
EPS, TINY = 1e-16, 1e-60


class Match:
    """Tell the image of a text from the images of other pairs.

    The score of a text and an image is the cosine, times a factor, between the mean text and the mean of what the
    fusion makes of both, each under a linear map of its own. The loss is InfoNCE over the images of a group (van den
    Oord et al. 2018, equation 4) with hard negatives: a pair of the batch, drawn, and those whose texts are closest to
    its own. A pair scores 1 if its image comes first among those of `pool` pairs of its part: the same
    number whatever the size of the data, or scores could not be compared.
    """

    name, score_name, baseline_name = "match", "recall@1", "chance"
    #: No margin: over three splits of the emoji, what was better on the pairs for validation was so on those held out.
    margin = 0.0
    unknown = 0
    #: Width that text and fusion are compared in at most; pairs of a group; pairs that are measured.
    space, group, pool = 256, 16, 200
    texts_per_image = group

    def __init__(self, text_dim: int) -> None:
        self._text_dim = text_dim

    def head(self, width: int) -> dict[str, nn.Parameter]:
        """See `Objective`."""
        return {
            "text_head.weight": _drawn(self.space, self._text_dim),
            "text_head.bias": nn.Parameter(torch.zeros(self.space)),
            "fused_head.weight": _drawn(self.space, width),
            "fused_head.bias": nn.Parameter(torch.zeros(self.space)),
            "logit_scale": nn.Parameter(torch.tensor([math.log(10.0)])),
        }

    def loss(self, head: Head, fusion: Fusion, batch: Batch) -> torch.Tensor:
        """See `Objective`."""
        hidden = partial(F.dropout, p=DROPOUT)
        text = _side(head, "text", hidden(masked_mean(batch.texts, batch.text_mask)))  # [B, space]
        groups = self._groups(text.detach())  # [groups, G]
        size = groups.shape[1]
        order = groups.flatten()
        mates = groups.repeat_interleave(size, 0)  # [B, G], the texts that each image meets
        images = replace(batch, images=batch.images[order], image_mask=batch.image_mask[order])
        fused = _side(head, "fused", hidden(fusion.each(images, mates)))  # [B, G, space]
        met = F.embedding(mates, text)  # [B, G, space]; gradients of `text[mates]` are added up in any order
        scores = (fused * met).sum(2) * _factor(head)  # image by text
        scores = scores.reshape(-1, size, size)  # [groups, G, G]
        true = torch.arange(size, device=scores.device).repeat(len(groups))
        return F.cross_entropy(scores.mT.flatten(0, 1), true)

    def _groups(self, text: torch.Tensor) -> torch.Tensor:
        """Positions of pairs ``[groups, G]``; what is left over is left out this time."""
        size = min(self.group, len(text))
        close = text @ text.mT
        close.fill_diagonal_(math.inf)
        free = torch.arange(len(text), device=text.device)
        groups = []
        for _ in range(len(text) // size):
            anchor = free[torch.randint(len(free), ())]
            nearest = close[anchor, free].topk(size).indices
            groups.append(free[nearest])
            free = free[~torch.isin(free, groups[-1])]
        return torch.stack(groups)

    def fit_head(self, represent: Representation, data: Data) -> tuple[Evaluation, Head]:
        """See `Objective`. The head is not learned but computed: see `canonical`."""
        moments = _moments(represent, data, data.parts["train"])
        heads = _heads(moments, represent.widths, self.space, represent.device)
        part = self._pooled(data.parts["validation"])
        tried = [
            (_measured(factor * cosines), {**head, "logit_scale": _log(factor, represent.device)})
            for head, cosines in zip(heads, self._cosines(heads, represent, data, part), strict=True)
            for factor in FACTORS
        ]
        return min(tried, key=lambda pair: pair[0].loss)

    def evaluate(self, head: Head, represent: Representation, data: Data, part: list[int]) -> Evaluation:
        """See `Objective`."""
        [cosines] = self._cosines([head], represent, data, self._pooled(part))
        return _measured(cosines * _factor(head).detach().cpu())

    def _cosines(
        self, heads: Sequence[Head], represent: Representation, data: Data, part: list[int]
    ) -> list[torch.Tensor]:
        """For each head, ``[texts, images]`` of the pairs ``part``."""
        with torch.no_grad():
            texts = torch.stack([data.texts.mean(at) for at in part]).to(represent.device)
            seen = [_side(head, "text", texts) for head in heads]
            columns: list[list[torch.Tensor]] = [[] for _ in heads]
            beside = represent.encode_beside(data, part)
            for image in part:
                fused = beside(image).to(represent.device)
                for column, head, text in zip(columns, heads, seen, strict=True):
                    column.append((text * _side(head, "fused", fused)).sum(1).cpu())
        return [torch.stack(column, 1) for column in columns]

    def baseline(self, part: list[int], train: list[int]) -> torch.Tensor:
        """See `Objective`: chance."""
        count = len(self._pooled(part))
        return torch.full((count,), 1 / count)

    def shares(self, part: list[int]) -> torch.Tensor | None:
        """See `Objective`."""
        return None

    def checksum(self) -> str:
        """See `Objective`: there are no labels."""
        return ""

    def facts(self) -> dict[str, Any]:
        """See `Objective`."""
        return {}

    def _pooled(self, part: list[int]) -> list[int]:
        count = min(len(part), self.pool)
        return [part[k * len(part) // count] for k in range(count)]  # evenly spread


def _drawn(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns).uniform_(-1, 1) / math.sqrt(columns))


def _log(factor: float, device: str) -> nn.Parameter:
    return nn.Parameter(torch.tensor([math.log(factor)], device=device))


def _factor(head: Head) -> torch.Tensor:
    return head["logit_scale"].clamp(max=math.log(100.0)).exp()


def _side(head: Head, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.normalize(F.linear(x, head[f"{name}_head.weight"], head[f"{name}_head.bias"]), dim=-1)


def _measured(scores: torch.Tensor) -> Evaluation:
    """How it comes out, from scores ``[texts, images]``."""
    true = torch.arange(len(scores), device=scores.device)
    # Equal scores count as beaten: a representation that cannot tell images apart scores nothing, nor does NaN.
    rank = (~(scores < scores.diagonal()[:, None])).sum(1)
    return Evaluation(float(F.cross_entropy(scores, true)), (rank <= 1).float())


class Moments:
    """Sums over samples of what a pair comes to ``x [samples, Dx]`` and what it is to tell ``y [samples, Dy]``."""

    def __init__(self, width: int, wanted: int) -> None:
        self._count, self._width = 0, width
        # Sums are taken from the middle of the first samples, or what varies would drown in what does not.
        self._origin = torch.zeros(width + wanted, dtype=torch.float64)
        self._sums = torch.zeros(width + wanted, dtype=torch.float64)
        self._products = torch.zeros(width + wanted, width + wanted, dtype=torch.float64)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """More samples."""
        both = torch.cat([x, y], 1).double()
        if not self._count:
            self._origin = both.mean(0)
        both -= self._origin
        self._count += len(both)
        self._sums += both.sum(0)
        self._products += both.mT @ both

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of ``x`` and of ``y``."""
        mean = self._sums / self._count + self._origin
        return mean[: self._width], mean[self._width :]

    def covariances(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of ``x`` with itself, of ``y`` with itself, of ``x`` with ``y``.

        Raises:
            ValuesError: the features are too large.
        """
        mean, at = self._sums / self._count, self._width
        both = self._products / self._count - torch.outer(mean, mean)
        if not torch.isfinite(both).all():
            raise ValuesError("numbers too large to learn from", hint="scale the features down")
        return both[:at, :at], both[at:, at:], both[:at, at:]


def canonical(
    x: torch.Tensor, y: torch.Tensor, cross: torch.Tensor, penalty: float, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps ``[k, Dx]`` and ``[k, Dy]`` under which two sides are most alike.

    Canonical correlations (Hotelling 1936, section 2) with ridges (Vinod 1976), each direction counting by the root of
    its correlation on either side.

    Args:
        x: covariances ``[Dx, Dx]``.
        y: ``[Dy, Dy]``.
        cross: ``[Dx, Dy]``.
        penalty: what is added to the variance in each direction, as a share of the mean variance.
        most: directions to keep.
    """
    left, right = _root(x, penalty), _root(y, penalty)
    between = torch.linalg.solve_triangular(left, cross, upper=False)
    between = torch.linalg.solve_triangular(right, between.mT, upper=False).mT  # [Dx, Dy]
    # The singular vectors of y's side, and from them those of x's: a fraction of the work of both at once.
    squares, v = torch.linalg.eigh(between.mT @ between)  # the largest last
    most = min(most, len(x))
    squares, v = squares.flip(0)[:most], v.flip(1)[:, :most]  # [k], [Dy, k]
    weight = squares.clamp(min=float(squares[0]) * EPS + TINY) ** 0.25
    u = torch.linalg.solve_triangular(left.mT, between @ v / weight, upper=True)
    v = torch.linalg.solve_triangular(right.mT, v * weight, upper=True)
    return u.mT, v.mT


def _root(covariance: torch.Tensor, penalty: float) -> torch.Tensor:
    """The lower triangle that times its transpose is the covariance with its ridge."""
    mean = float(covariance.diagonal().mean())
    ridge = penalty * mean if mean > 0 else 1.0  # of what does not vary at all nothing is left anyway
    lower: torch.Tensor = torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype))
    return lower


@one_thread()
def _heads(moments: Moments, widths: list[int], space: int, device: str) -> list[dict[str, nn.Parameter]]:
    """A head for each of `PENALTIES` and scales of the parts, ``widths``, of a vector."""
    (x, y, cross), means, heads = moments.covariances(), moments.means(), []
    for scale, penalty in product(_scales(x.diagonal(), widths), PENALTIES):
        scaled = x * torch.outer(scale, scale), y, cross * scale[:, None]
        fused, text = canonical(*scaled, penalty, space)
        head = {}
        for name, weight, mean in zip(("fused", "text"), (fused * scale, text), means, strict=True):
            weight = weight / weight.square().mean().sqrt().clamp(min=1e-30)  # cosines do not mind
            head[f"{name}_head.weight"], head[f"{name}_head.bias"] = weight, -weight @ mean
        heads.append({name: nn.Parameter(tensor.float().to(device)) for name, tensor in head.items()})
    return heads


def _scales(variances: torch.Tensor, widths: list[int]) -> list[torch.Tensor]:
    """Factors ``[Dx]`` for the channels of a vector, alike within each of its parts; one part stays as it is."""
    if len(widths) == 1:
        return [torch.ones_like(variances)]
    usual = usual_spread(variances.clamp(min=0).sqrt(), widths)
    first, second = torch.where(usual > 0, 1 / usual, 1.0).split_with_sizes(widths)
    return [torch.cat([balance * first, second]) for balance in BALANCES]


def _moments(represent: Representation, data: Data, part: list[int]) -> Moments:
    """Of images that meet the texts of other pairs, and the texts that are theirs.

    With its own text, a fusion would tell the text from the text, and nothing would be learned of the image.
    """
    moments = Moments(represent.width, data.texts.width)
    order = [part[at] for at in torch.randperm(len(part), generator=torch.Generator().manual_seed(0)).tolist()]
    place = {pair: at for at, pair in enumerate(order)}
    for some in batches(data, part, EVALUATED, None):
        own = torch.stack([data.texts.mean(pair) for pair in some])
        times = min(len(part) - 1, max(1, SAMPLES // len(part)))
        with torch.no_grad():
            meet = _meeting(represent, data, some, times)
            for shift in range(1, 1 + times):
                moments.add(meet([order[(place[pair] + shift) % len(order)] for pair in some]), own)
    return moments


def _meeting(
    represent: Representation, data: Data, images: list[int], times: int
) -> Callable[[list[int]], torch.Tensor]:
    """Gives vectors ``[B, width]`` of ``images`` with texts of as many other pairs; called ``times`` times."""
    device = represent.device
    met = represent.encode_images(load(data, images).to(device), times)

    def meet(texts: list[int]) -> torch.Tensor:
        if len(texts) * max(map(data.texts.length, texts)) <= MOST_ROWS:
            return met(*(part.to(device) for part in data.texts.padded(texts))).cpu()
        # A long one among short ones: they are not to be padded to it.
        by_length = sorted(range(len(texts)), key=lambda at: data.texts.length(texts[at]))
        lengths = [(data.images.length(images[at]), data.texts.length(texts[at])) for at in by_length]
        found = torch.empty(len(texts), represent.width)
        for part in cut(lengths, len(texts)):
            some = by_length[part]
            batch = load(data, [texts[at] for at in some], [images[at] for at in some])
            found[some] = represent.encode(batch.to(device)).cpu()
        return found

    return meet
