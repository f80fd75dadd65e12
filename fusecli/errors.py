"""The errors a user can meet, and what each one means for the exit code.

::

    FusecliError                 1  could not finish
    ├── OutputError              1  the result cannot be written
    ├── DeviceError              1  the device asked for is not there
    ├── TrainingError            1  the training cannot go on
    ├── MissingPackageError      1  a package is needed for this and absent
    ├── UsageError               2  what was asked makes no sense
    └── InputError               3  something that was read is bad
        ├── FileError            3  a file cannot be opened, or is not what its name says
        ├── ShapeError           3  an array has the wrong number of axes, rows or columns
        ├── ValuesError          3  an array holds values that cannot be used (NaN, Inf)
        │   └── OneRowError      3  one image row, where a map of several is wanted
        └── CheckpointError      3  a checkpoint lacks, adds or misshapes a tensor

Every message says what, where, found and wanted; a hint is something that can be typed or done.
They become words for the user in ``fusecli.cli``; of a pair among many, in ``fusecli.batch.job``.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

#: What the standard streams are called where a message names a file.
STDIN, STDOUT = "<stdin>", "<stdout>"


class FusecliError(Exception):
    """Root of the tree.

    Args:
        what: what is wrong, without a full stop.
        where: file, tensor, row or option that it is about.
        found: what is there.
        wanted: what should be there.
        hint: what the user can do now.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        found: str | None = None,
        wanted: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.found, self.wanted, self.hint = what, where, found, wanted, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{_clip(self.where)}: {_clip(self.what)}" if self.where else _clip(self.what)
        details = [f"found {_clip(self.found)}"] if self.found else []
        details += [f"wanted {_clip(self.wanted)}"] if self.wanted else []
        return f"{text}: {', '.join(details)}" if details else text

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and errors cross processes.
        return (_rebuild, (type(self), self.what, self.where, self.found, self.wanted, self.hint))


def _clip(text: str, length: int = 300) -> str:
    # What was found may be megabytes of a hostile header.
    return text if len(text) <= length else f"{text[:length]}…"


def _rebuild(
    kind: type[FusecliError],
    what: str,
    where: str | None,
    found: str | None,
    wanted: str | None,
    hint: str | None,
) -> FusecliError:
    return kind(what, where=where, found=found, wanted=wanted, hint=hint)


class OutputError(FusecliError):
    """The result cannot be written: no such folder, no permission, no space, no such dtype."""


class DeviceError(FusecliError):
    """The device asked for does not exist here."""


class TrainingError(FusecliError):
    """The training cannot go on: its loss became NaN or Inf."""


class MissingPackageError(FusecliError):
    """A package is needed and not installed."""


class UsageError(FusecliError, ValueError):
    """What was asked makes no sense: an option, a name, or several together."""

    exit_code = 2


class InputError(FusecliError):
    """Something that was read cannot be used."""

    exit_code = 3


class FileError(InputError):
    """A file is missing, unreadable, cut short, or not of the format that its name promises."""


class ShapeError(InputError, ValueError):
    """An array has the wrong number of axes, no rows, or a width that does not fit."""


class ValuesError(InputError, ValueError):
    """An array holds NaN or Inf, or has a dtype that is no float."""


class OneRowError(ValuesError):
    """There is one image row, of which no map can be drawn."""


class CheckpointError(InputError, ValueError):
    """A checkpoint lacks a tensor, has one too many, or one of the wrong shape."""


def unwritable(path: str | None, error: OSError, what: str = "cannot be written") -> OutputError:
    """What to say of a file or stream that the system does not let be written."""
    hint = "free some space, or write elsewhere" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return OutputError(what, where=path, found=error.strerror or str(error), hint=hint)


def listed(names: Iterable[str], most: int = 5, count: int | None = None) -> str:
    """The first ``most`` names, long ones shortened, with an ellipsis if there are more (``count`` in all)."""
    known = list(names)
    shown = ", ".join(_clip(name, 60) for name in known[:most])
    return shown + (", …" if max(count or 0, len(known)) > most else "")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, here or on a GPU."""
    here = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return here or isinstance(error, MemoryError) or is_out_of_gpu_memory(error)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Whether that of a GPU did not: torch's error for it has no base that can be named here."""
    return type(error).__name__ == "OutOfMemoryError"
