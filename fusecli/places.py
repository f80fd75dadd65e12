"""From a place to the features there, whoever needs them."""

from __future__ import annotations

import os
from functools import lru_cache

from fusecli.collections import Place, stamp_of, stored_at
from fusecli.errors import FileError, InputError
from fusecli.formats import Source, Stored, open_source, open_tensors, reason
from fusecli.pairs import choose, find_features

#: Files of up to so many bytes are read at once. Few for images: of one row, a worker holds those of a whole item.
AT_ONCE = {"image": 2**14, "text": 2**18}


def features_at(place: Place, side: str) -> Stored:
    """The features at ``place``, not read yet; ``side`` is ``"image"`` or ``"text"``.

    Raises:
        InputError: they are not there or cannot be used.
    """
    try:
        if place.span is not None:
            return stored_at(place.span, _kept_open(place.path, place.span.stamp))
        if place.key is not None:
            return choose(_kept_tensors(place.path, stamp_of(os.stat(place.path))), place.path, side, place.key)
        return find_features(place.path, side, None, AT_ONCE[side])
    except InputError:  # some of them are a ValueError too
        raise
    except FileNotFoundError:
        raise FileError("no such file", where=place.path) from None
    except (OSError, ValueError) as error:
        raise FileError("cannot be opened", where=place.path, found=reason(error)) from error


@lru_cache(maxsize=8)  # packed and stacked files: a few, read by many tasks
def _kept_open(path: str, stamp: tuple[int, ...]) -> Source:
    source = open_source(path)
    if stamp_of(os.stat(path)) != stamp:
        raise FileError("was replaced or changed while the run was under way", where=path, hint="start again")
    return source


@lru_cache(maxsize=8)  # files of many tensors that a manifest names one by one
def _kept_tensors(path: str, stamp: tuple[int, ...]) -> dict[str, Stored]:
    return open_tensors(path, regular=True)
