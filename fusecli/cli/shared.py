"""What `fuse` and `batch` share beside options: weights, attention to be written, and words for one image row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fusecli.cli.options import require_names
from fusecli.errors import UsageError

if TYPE_CHECKING:
    from fusecli.weights import Weights

ONE_ROW = (
    "one image row: every text row gets the same vector, whatever it says; "
    "use image regions, --residual or another method"
)
KEPT_TEXT = "one image row: every text row has the same vector added to it, whatever it says"


def check_attention_options(attention: str | None, given: dict[str, Any]) -> None:
    """Raise `UsageError` if options ``given`` by name say something of ``attention`` that it cannot hold."""
    from fusecli.formats import has_names

    require_names({"--attention": attention, "--tokens": given["tokens"]})
    for name, value in given.items():
        if value is None or value is False:
            continue
        if attention is None:
            raise UsageError("requires --attention", where=f"--{name}", hint="add --attention OUT")
        if name in ("tokens", "grid", "skip-rows") and not has_names(attention):
            hint = f"write .safetensors, or give --{name} to fusecli show"
            raise UsageError("only .safetensors can store it", where=f"--{name}", found=attention, hint=hint)
        if value == "bfloat16" and not has_names(attention):
            hint = "write .safetensors, or take float16"
            raise UsageError(".npy cannot name bfloat16", where=f"--{name}", found=attention, hint=hint)


def load_weights(
    path: str | None,
    num_heads: int | None,
    seed: int,
    residual: bool,
    attention: str | None,
    tell: Callable[[str], None],
) -> Weights:
    """The weights that a command was asked to use, untrained ones if none."""
    from fusecli import checkpoint
    from fusecli.fusion import require_attention
    from fusecli.weights import require_heads

    require_names({"--weights": path})
    if not path and num_heads:
        require_heads(num_heads, 768)
    if path:
        loaded = checkpoint.load(path, num_heads, tell=tell)
    else:
        tell(f"untrained weights (seed {seed}): the numbers mean nothing yet; pass --weights FILE")
        loaded = checkpoint.init(num_heads=num_heads or 8, seed=seed)
    if attention:
        require_attention(loaded.config)
    if residual and loaded.config.method != "attention":
        found = f"method {loaded.config.method}"
        raise UsageError("only for method attention", where="--residual", found=found, hint="leave it out")
    if residual and loaded.text_dim != loaded.dim:
        found = f"Dt={loaded.text_dim}, D={loaded.dim}"
        hint = f"weights of fusecli init --feature-dim {loaded.text_dim}, with --num-heads that divide it"
        raise UsageError("adds the text to the result, so it needs Dt = D", where="--residual", found=found, hint=hint)
    return loaded.with_options(residual=True) if residual else loaded
