"""fusecli: text features that carry what the image adds.

    >>> import fusecli
    >>> weights = fusecli.load("fusion.safetensors")
    >>> fused = fusecli.fuse(weights, image, text)      # [N, D], NumPy or torch

Public names are loaded on first use, so that importing the package costs nothing and torch is imported only
by those who name `ImageTextFusion` or load a `.pt`.
"""

TYPE_CHECKING = False  # as in `typing`, whose import takes a while in which Ctrl-C is not in our hands yet
if TYPE_CHECKING:
    from typing import Any

    from fusecli.checkpoint import fingerprint, identity, init, load, save
    from fusecli.errors import FusecliError
    from fusecli.fusion import fuse
    from fusecli.module import ImageTextFusion
    from fusecli.weights import Config, Weights

__version__ = "0.1.0"

_HOMES = {
    "fingerprint": "checkpoint",
    "identity": "checkpoint",
    "init": "checkpoint",
    "load": "checkpoint",
    "save": "checkpoint",
    "FusecliError": "errors",
    "Config": "weights",
    "Weights": "weights",
    "fuse": "fusion",
    "ImageTextFusion": "module",
}

__all__ = [
    "Config",
    "FusecliError",
    "ImageTextFusion",
    "Weights",
    "__version__",
    "fingerprint",
    "fuse",
    "identity",
    "init",
    "load",
    "save",
]


def __getattr__(name: str) -> "Any":
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'fusecli' has no attribute {name!r}")
    value = getattr(import_module(f"fusecli.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
