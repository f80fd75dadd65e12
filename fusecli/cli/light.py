"""Commands that start fast.

Typer checks every parameter through pydantic, even those that were not given, and importing pydantic takes as
long as importing NumPy. Here a parameter goes that way only when there is something to say about it, or to convert
that is no plain number or choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class _Light:
    """Stands in for Typer's own converter of one parameter, and makes way for it when it is needed."""

    def __init__(self, descriptor: Any) -> None:
        self._kind, self._limits = descriptor.annotation, descriptor.parameter_info

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """``value`` as the command wants it; called by Typer."""
        if value is None and not param.multiple and param.nargs == 1:
            return None
        plain = self._plain(value) if isinstance(self._kind, type) else None
        if plain is not None:
            return plain
        param._runtime_param = None  # Typer builds its own
        return param.get_runtime_param().coerce(value, param=param, ctx=ctx)

    def _plain(self, value: Any) -> Any:
        """``value`` converted, None where that takes more than a look."""
        if isinstance(value, self._kind):
            return value  # a string, or a default
        if isinstance(value, str) and issubclass(self._kind, Enum):
            return self._kind._value2member_map_.get(value)
        if self._kind is int and isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
            low, high, number = self._limits.min, self._limits.max, int(value)
            return number if (low is None or low <= number) and (high is None or number <= high) else None
        return None


def _lighten(params: list[Any]) -> None:
    """Do so for all parameters, under versions of Typer that know of such converters."""
    for param in params:
        descriptor = getattr(param, "type_descriptor", None)
        if descriptor is not None and getattr(param, "_runtime_param", params) is None:
            param._runtime_param = _Light(descriptor)


class LightCommand(TyperCommand):
    """A command whose parameters are `_Light`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Called by Typer when all parameters are there, its own among them."""
        _lighten(self.get_params(ctx))
        return super().parse_args(ctx, args)


class LightGroup(TyperGroup):
    """A group of commands likewise; a closed pipe ends it quietly."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Called by Typer when all parameters are there, its own among them."""
        _lighten(self.get_params(ctx))
        return super().parse_args(ctx, args)

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Read the command line, or show a help text."""
        with _while_read():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        with _while_read():
            return super().invoke(ctx)


@contextmanager
def _while_read() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # `| head` has seen enough: no error, and nothing to say
        raise typer.Exit(0) from None
