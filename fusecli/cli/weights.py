"""``fusecli init`` and ``fusecli convert``: weights and where they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fusecli.cli.console import emit, note
from fusecli.cli.options import (
    Debug,
    DimFeedforward,
    Dropout,
    DtypeName,
    GateOption,
    Json,
    MethodName,
    MethodOption,
    NumLayers,
    Quiet,
    Residual,
    SelfAttention,
    method_options,
    require_safetensors,
)
from fusecli.cli.paths import refuse_same_file
from fusecli.errors import UsageError

if TYPE_CHECKING:
    from fusecli.weights import Weights

Output = Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="Checkpoint to write (.safetensors).")]

MAX_WIDTH = 2**20


def init(
    output: Output,
    method: MethodOption = MethodName.attention,
    feature_dim: Annotated[
        int, typer.Option(metavar="N", min=1, max=MAX_WIDTH, help="D, the width of the fused features.")
    ] = 768,
    text_dim: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=MAX_WIDTH, help="Dt, the width of the text features.  [default: D]"),
    ] = None,
    image_dim: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=MAX_WIDTH, help="Di, the width of the image features.  [default: D]"),
    ] = None,
    num_heads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="H, the number of attention heads.  [default: 8; 1 with --identity]"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Seed of the random weights.  [default: 0]")
    ] = None,
    identity: Annotated[
        bool, typer.Option("--identity", help="Identity projections: no training, for sides that share a space.")
    ] = False,
    residual: Residual = False,
    gate: GateOption = None,
    num_layers: NumLayers = None,
    dim_feedforward: DimFeedforward = None,
    self_attention: SelfAttention = False,
    dropout: Dropout = None,
    layer_norm: Annotated[
        bool, typer.Option("--layer-norm", help="Normalise text and image first (layer norm).")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make new weights, random or identity.

    Random ones are drawn as PyTorch draws them, the same on every machine.

    fusecli init -o fusion.safetensors --method gated --layer-norm
    """
    parameters = locals()
    from fusecli import checkpoint
    from fusecli.weights import require_heads

    require_safetensors(output)
    heads = num_heads or (1 if identity else 8)
    options = method_options(method, parameters)
    options.pop("num_heads", None)
    widths = feature_dim, text_dim or feature_dim, image_dim or feature_dim
    if identity:
        _check_identity(method, seed, widths)
    if (residual or method is MethodName.gated) and widths[1] != feature_dim:
        what = "--residual" if residual else "--method gated"
        hint = f"--feature-dim {text_dim}, with --num-heads that divide it"
        raise UsageError(f"{what} needs Dt = D", found=f"Dt={text_dim}, D={feature_dim}", hint=hint)
    if method not in (MethodName.weighted_sum, MethodName.concat):
        require_heads(heads, feature_dim)
    if identity:
        weights = checkpoint.identity(feature_dim, heads, **options)
    else:
        weights = checkpoint.init(feature_dim, heads, text_dim=text_dim, image_dim=image_dim, seed=seed or 0, **options)
    _write(weights, output, json, quiet)


def _check_identity(method: MethodName, seed: int | None, widths: tuple[int, int, int]) -> None:
    if len(set(widths)) > 1:
        raise UsageError("--identity needs equal widths", found="D={}, Dt={}, Di={}".format(*widths))
    if method is MethodName.transformer:
        raise UsageError("a transformer has no identity", where="--identity", hint="choose another --method")
    if seed is not None:
        raise UsageError("nothing is drawn for --identity", where="--seed", hint="leave it out")


def convert(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A PyTorch state_dict (.pt, .pth, .bin) or a .safetensors checkpoint."),
    ],
    output: Output,
    num_heads: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="H, the number of attention heads; a state_dict does not say.  [default: 8]"
        ),
    ] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Dtype of the tensors.  [default: as they are]")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint to .safetensors or another dtype.

    It may be a state_dict of PyTorch, or a checkpoint of fusecli already.

    fusecli convert model.pt -o fusion.safetensors --num-heads 8
    """
    from fusecli import checkpoint

    require_safetensors(output)
    refuse_same_file([output], [model])
    weights = checkpoint.load(model, num_heads, tell=lambda line: note(line, quiet))
    _write(checkpoint.stored_as(weights, dtype) if dtype else weights, output, json, quiet)


def _write(weights: Weights, output: str, json: bool, quiet: bool) -> None:
    from fusecli import checkpoint

    checkpoint.save(weights, output)
    facts = {
        "output": output,
        **weights.facts(),
        "fingerprint": checkpoint.fingerprint(weights),
    }
    if json:
        emit(facts)
    else:
        count = facts.get("num_heads")
        heads = f"{count} head{'s' * (count > 1)}, " if count else ""
        note(f"{output}: {facts['parameters']:,} parameters, {heads}fingerprint {facts['fingerprint']}", quiet)
