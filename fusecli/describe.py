"""What a file is, in facts: the work behind ``fusecli inspect``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fusecli import checkpoint
from fusecli.arrays import FLOAT_NAMES, dtype_name
from fusecli.dumps import About, names_of
from fusecli.errors import CheckpointError
from fusecli.formats import NumpyArray, Stored, open_source, tensors_of
from fusecli.state_dict import is_pt
from fusecli.weights import Weights, are_of_weights

#: Bytes read at once, in whole rows: many rows are described in little memory.
BLOCK = 2**24


def describe(
    path: str, num_heads: int | None = None, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Names, shapes, dtypes, norms of rows and number of NaN/Inf of each tensor, and what they make together.

    ``kind`` is ``checkpoint``, ``attention`` or ``features``, or ``no checkpoint`` with a ``problem`` for what looks
    like one. A checkpoint also has method, heads, widths, parameter count and fingerprint; attention of ``[H, N, M]``
    has them as ``heads``, ``text_rows``, ``image_rows``, and a stack of it ``pairs`` as well.

    Args:
        path: the file; ``-`` is standard input.
        num_heads: of a checkpoint that does not say.
        tell: is called with a line for the user where 8 heads had to be assumed.

    Raises:
        FileError: the file cannot be read.
        CheckpointError: a file of `torch.save` is no checkpoint.
    """
    source = open_source(path)
    if is_pt(source):
        weights = checkpoint.load_from(source, num_heads, tell)
        listed = [{"name": name, **_facts(tensor)} for name, tensor in sorted(weights.tensors.items())]
        return {"file": path, **_of_checkpoint(weights), "tensors": listed}
    tensors = tensors_of(source)
    rows = [_scan(stored) for _, stored in sorted(tensors.items())]
    stochastic = [row.pop("stochastic") for row in rows]
    if are_of_weights(tensors):
        try:
            facts = _of_checkpoint(checkpoint.load_from(source, num_heads, tell))
        except CheckpointError as error:
            facts = {"kind": "no checkpoint", "problem": str(error)}
        return {"file": path, **facts, "tensors": rows}
    kind: dict[str, Any] = {"kind": "features"}
    about = About.of(source)
    names, many = names_of(tensors, about)
    lone = None if many or not names else sorted(tensors).index(names[0])
    if lone is not None and stochastic[lone] and len(rows[lone]["shape"]) in (2, 3, 4):
        *pairs, n, m = rows[lone]["shape"]
        heads = pairs.pop() if pairs else "mean"
        kind = {"kind": "attention", **({"pairs": pairs[0]} if pairs else {})}
        kind |= {"heads": heads, "text_rows": n, "image_rows": m}
    elif about.ids:
        kind = {"kind": "attention", "pairs": len(about.ids)}
    if kind["kind"] == "attention":
        kind |= {name: about.facts[name] for name in ("method", "weights") if name in about.facts}
    return {"file": path, **kind, "tensors": rows}


def _of_checkpoint(weights: Weights) -> dict[str, Any]:
    return {"kind": "checkpoint", **weights.facts(), "fingerprint": checkpoint.fingerprint(weights)}


def _scan(stored: Stored) -> dict[str, Any]:
    facts = {"name": stored.name, "shape": list(stored.shape), "dtype": stored.dtype}
    if stored.dtype not in FLOAT_NAMES or not stored.nbytes:
        return facts | {"norms": None, "nonfinite": None, "stochastic": False}
    shape = (1,) * max(0, 2 - len(stored.shape)) + stored.shape
    whole = stored._replace(shape=shape if stored.fortran else (math.prod(shape[:-1]), shape[-1]))
    step = max(1, BLOCK // (whole.nbytes // whole.shape[0]))
    if stored.fortran and len(shape) > 2:  # each block would take all of it
        step = whole.shape[0]
    starts = range(0, whole.shape[0], step)
    return facts | _summary([_rows(whole.read(slice(at, min(at + step, whole.shape[0])))) for at in starts])


def _facts(tensor: NumpyArray) -> dict[str, Any]:
    facts = {"shape": list(tensor.shape), "dtype": dtype_name(tensor), **_summary([_rows(np.atleast_2d(tensor))])}
    del facts["stochastic"]
    return facts


def _rows(block: NumpyArray) -> tuple[NumpyArray, int, bool]:
    """Norms of the rows, number of NaN/Inf, and whether every row is a distribution (not negative, sum 1)."""
    bad = int((~np.isfinite(block)).sum())
    with np.errstate(over="ignore", invalid="ignore"):
        rows = block.reshape(-1, block.shape[-1]).astype(np.float64)
        sums = rows.sum(1)
        scale = 1.0
        if block.dtype.itemsize >= 8:  # squares of float64 may not fit it
            scale = np.fmax(abs(rows).max(1, initial=0), np.finfo(np.float64).tiny)
            rows = rows / scale[:, None]
        norms = np.linalg.norm(rows, axis=1) * scale
    stochastic = bool((rows >= 0).all() and (abs(sums - 1) < 1e-2).all())
    return norms, bad, stochastic


def _summary(parts: list[tuple[NumpyArray, int, bool]]) -> dict[str, Any]:
    norms = np.concatenate([part[0] for part in parts])
    norms = norms[np.isfinite(norms)]
    mean = float((norms / max(len(norms), 1)).sum())  # the sum of all might not fit
    spread = {"min": float(norms.min()), "max": float(norms.max()), "mean": mean} if len(norms) else None
    return {"norms": spread, "nonfinite": sum(part[1] for part in parts), "stochastic": all(part[2] for part in parts)}
