"""Where the pairs of `batch` and `train` come from: options, what they exclude, and the pairs themselves."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from fusecli.cli.console import note
from fusecli.cli.options import require_names
from fusecli.errors import STDIN, FileError, InputError, UsageError, listed

if TYPE_CHECKING:
    from fusecli.batch.feed import Pairs
    from fusecli.batch.manifest import Manifest
    from fusecli.batch.plan import Shard

ImagePattern = Annotated[
    str | None, typer.Option(metavar="PATTERN", help="Where the id stands in an image's file name: '{id}.image.npy'.")
]
TextPattern = Annotated[
    str | None, typer.Option(metavar="PATTERN", help="Where the id stands in a text's file name: '{id}.text.npy'.")
]
ImageKey = Annotated[
    str | None, typer.Option(metavar="NAME", help="Name of the tensor to take from each .safetensors of images.")
]
TextKey = Annotated[
    str | None, typer.Option(metavar="NAME", help="Name of the tensor to take from each .safetensors of texts.")
]


@dataclass(frozen=True)
class Sources:
    """Where the pairs come from, as it was typed."""

    images: str | None
    texts: str | None
    manifest: str | None
    image_key: str | None
    text_key: str | None
    image_pattern: str | None
    text_pattern: str | None
    tokens: str | None = None

    @property
    def one_place(self) -> bool:
        """Whether both sides lie in the same place."""
        if self.images is None:
            return False
        return self.texts is None or os.path.realpath(self.texts) == os.path.realpath(self.images)

    def paths(self) -> list[str]:
        """The places that are read."""
        return [path for path in (self.images, self.texts, self.manifest, self.tokens) if path and path != "-"]

    def seen_from(self, output: str) -> dict[str, str | None]:
        """For the ledger, paths as seen from the output: moved together, they are still the same."""
        facts = asdict(self) | {"texts": self.texts or self.images}
        start = os.path.realpath(output)
        for name in ("images", "texts", "manifest", "tokens"):
            if facts[name] not in (None, "-"):
                real = os.path.realpath(facts[name])
                lasts = os.path.isfile(real) or os.path.isdir(real)  # a pipe is another one each time
                facts[name] = os.path.relpath(real, start) if lasts else "-"
        return facts


def check_sources(sources: Sources) -> None:
    """Raise `UsageError` if the options do not say where pairs come from."""
    from fusecli.collections import matcher

    names = asdict(sources)
    require_names({side.upper(): names.pop(side) for side in ("images", "texts")})
    require_names({f"--{name.replace('_', '-')}": value for name, value in names.items()})
    if sources.manifest is None and sources.images is None:
        raise UsageError("no features", hint="give IMAGES and TEXTS, or --manifest FILE")
    if "-" in (sources.images, sources.texts):
        raise UsageError("features of many pairs cannot come on stdin", where="-", hint="name a folder or a file")
    if sources.manifest is not None and sources.images is not None:
        raise UsageError("a manifest names both sides itself", where="--manifest", hint="leave out IMAGES and TEXTS")
    patterns = {"image": sources.image_pattern, "text": sources.text_pattern}
    if sources.manifest is not None and any(patterns.values()):
        hint = "leave out --image-pattern and --text-pattern"
        raise UsageError("a manifest names every id itself", where="--manifest", hint=hint)
    if sources.one_place and not (
        _told_apart(sources.image_pattern, sources.text_pattern) or _told_apart(sources.image_key, sources.text_key)
    ):
        hint = "give TEXTS of their own, or --image-pattern '{id}.image.npy' --text-pattern '{id}.text.npy'"
        raise UsageError(
            "images and texts are the same place, with nothing to distinguish them", where=sources.images, hint=hint
        )
    for side, pattern in patterns.items():
        try:
            matcher("{id}" if pattern is None else pattern)
        except ValueError:
            raise UsageError(
                "not a pattern", where=f"--{side}-pattern", found=pattern, wanted="{id} in it once"
            ) from None


def _is_descriptor(path: str) -> bool:
    """Whether a file is one that is open already: ``<(...)`` is ``/dev/fd/63``, which lies nowhere."""
    folder = os.path.realpath(os.path.dirname(path))
    return folder in ("/dev", "/dev/fd") or folder.startswith("/proc/")


def _told_apart(image: str | None, text: str | None) -> bool:
    return image is not None and text is not None and image != text


def refuse_inside(output: str, folders: Iterable[str]) -> None:
    """Raise `UsageError` if ``output`` lies in one of the ``folders``, which are read."""
    real = os.path.realpath(output)
    if any(real.startswith(os.path.realpath(folder) + os.sep) for folder in folders):
        raise UsageError("output would lie among the inputs", where=output, hint="write to another place")


def find_stream(sources: Sources) -> Manifest:
    """The manifest that reads its pairs from standard input."""
    from fusecli.batch.manifest import Manifest

    if sys.stdin is None:
        raise FileError("is closed", where=STDIN)
    return Manifest(STDIN, "", sources.image_key, sources.text_key)


def find_pairs(
    sources: Sources, outputs: list[str | None], shard: Shard | None = None, weights: str | None = None
) -> Pairs:
    """The pairs, where they are all there already."""
    from fusecli.batch.apart import Inputs
    from fusecli.batch.feed import from_collections, from_manifest
    from fusecli.batch.manifest import Manifest
    from fusecli.batch.plan import match
    from fusecli.collections import open_collection
    from fusecli.pairs import GIVE_WEIGHTS
    from fusecli.weights import are_of_weights

    inputs = Inputs(filter(None, outputs))
    for place in (*sources.paths(), weights):
        if place and os.path.isfile(place):
            inputs.see(place)
    if sources.manifest is not None:
        path = sources.manifest
        folder = "" if _is_descriptor(path) else os.path.dirname(path)
        manifest = Manifest(path, folder, sources.image_key, sources.text_key)
        return from_manifest(manifest, path, shard, inputs)
    image_place = sources.images or ""
    text_place = sources.texts or image_place
    own = {os.path.realpath(path) for path in outputs if path}
    images = open_collection(image_place, sources.image_key, sources.image_pattern, own)
    texts = open_collection(text_place, sources.text_key, sources.text_pattern, own)
    found = match(images, texts, shard)
    if not found.both and not shard:
        shown = [", ".join(ids[:3]) or "nothing" for ids in (found.no_text, found.no_image)]
        hint = "ids are paths without suffix, names of tensors or numbers of rows; see --image-pattern"
        raise InputError(
            "no id has both an image and a text",
            found=f"{shown[0]} in {image_place}; {shown[1]} in {text_place}",
            wanted="the same names on both sides",
            hint=GIVE_WEIGHTS if are_of_weights(images) or are_of_weights(texts) else hint,
        )
    return from_collections(images, texts, found, inputs)


def complete_ids(pairs: Pairs, labels: dict[str, str] | None, allow_missing: bool, quiet: bool) -> list[str]:
    """The ids that have all there is to have; the others are counted and listed."""
    for outcome in pairs.known:
        if outcome.status == "failed":
            raise InputError(outcome.facts["message"])
    lacking = {
        f"without {side}": [outcome.id for outcome in pairs.known if outcome.facts.get("missing") == side]
        for side in ("image", "text")
    }
    ids: list[str] = pairs.ids
    if labels is not None:
        there = {*ids, *(outcome.id for outcome in pairs.known)}
        lacking["without label"] = [id for id in ids if id not in labels]
        lacking["labelled, without a pair"] = [id for id in labels if id not in there]
        ids = [id for id in ids if id in labels]
        if pairs.ids and labels and not ids:
            found, wanted = f"{next(iter(labels))!r} among the labels", f"ids such as {pairs.ids[0]!r}"
            hint = "ids are paths without suffix, names of tensors or numbers of rows"
            raise InputError("no label belongs to a pair", found=found, wanted=wanted, hint=hint)
    told = [f"{len(some):,} {what}" for what, some in lacking.items() if some]
    for what, some in lacking.items():
        if some:
            note(f"{len(some):,} {'id' if len(some) == 1 else 'ids'} {what}: {listed(some)}", quiet)
    if told and not allow_missing:
        raise InputError(
            "some ids lack an image, a text or a label", found=", ".join(told), hint="--allow-missing skips them"
        )
    if not ids:
        raise InputError("no pair is left to train on", found=", ".join(told) or "no pairs")
    return ids
