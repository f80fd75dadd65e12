"""What ``fusecli train`` is asked to learn: looked through, and made a recipe."""

from __future__ import annotations

import os
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any

from fusecli.cli.options import MethodName, given_options, method_options, require_names, require_safetensors
from fusecli.cli.paths import refuse_same_file
from fusecli.cli.sources import Sources, check_sources, refuse_inside
from fusecli.errors import OutputError, UsageError

if TYPE_CHECKING:
    from fusecli.training.recipe import Recipe
    from fusecli.weights import Weights


class Task(StrEnum):
    """What labels are."""

    classify = "classify"
    regression = "regression"


class Objective(StrEnum):
    """What to learn without labels."""

    match = "match"


class ClassWeights(StrEnum):
    """How much classes count."""

    balanced = "balanced"


def check(sources: Sources, output: str, labels: str | None, weights: str | None, kept: float) -> None:
    """Raise `UsageError` or `OutputError` for inputs and outputs that cannot be, ``kept`` the pairs not trained on."""
    from fusecli.formats import require_folder
    from fusecli.training.files import files_of

    check_sources(sources)
    require_safetensors(output)
    if sources.manifest == "-":
        raise UsageError("pairs are read more than once, so they cannot come on stdin", where="--manifest")
    if kept >= 1:
        raise UsageError("nothing is left to train on", where="--validation and --held-out", found=f"{kept:g}")
    outputs = [output, *files_of(output)]
    refuse_same_file(outputs, [*(path for path in sources.paths() if os.path.isfile(path)), labels, weights])
    refuse_inside(output, filter(os.path.isdir, sources.paths()))
    for path in outputs:
        if os.path.isdir(path):
            raise OutputError("is a directory", where=path, wanted="a file name")
        require_folder(path)


def check_labels(given: dict[str, Any]) -> None:
    """Raise `UsageError` for options of labels where there are none, and of classes where there are numbers."""
    of_classes = ("class_weights", "label_smoothing")
    require_names({"--labels": given["labels"], "--label-column": given["label_column"]})
    if given["labels"] and given["objective"]:
        raise UsageError(
            "--objective match is for training without labels", where="--objective", hint="leave one of them out"
        )
    for name in ("label_column", "task", "text_dropout", *of_classes):
        where = f"--{name.replace('_', '-')}"
        if given[name] is not None and given["labels"] is None:
            raise UsageError("there are no labels", where=where, hint="add --labels FILE")
        if given[name] is not None and given["task"] is Task.regression and name in of_classes:
            raise UsageError("numbers have no classes", where=where, hint="leave it out")


def options_of_method(parameters: dict[str, Any]) -> dict[str, Any]:
    """Method and options from the command's parameters; none where a checkpoint brings its own."""
    method, layer_norm = parameters["method"] or MethodName.gated, parameters["layer_norm"]
    if parameters["weights"] is None:
        if layer_norm is None:  # the article's module has none, and what is trained for it has to fit it
            layer_norm = method is not MethodName.attention
        return method_options(method, parameters | {"layer_norm": layer_norm})
    asked = {name: parameters[name] for name in ("method", "feature_dim")}
    given = given_options(parameters)
    given.pop("num_heads", None)  # a bare state_dict does not say it
    extra = [*given, *(name for name, value in asked.items() if value is not None)]
    if layer_norm is False:  # that was given too
        extra.append("layer_norm")
    if extra:
        where = "--" + extra[0].replace("_", "-")
        raise UsageError("the checkpoint brings its own", where=where, hint="leave one of them out")
    return {}


def recipe_of(
    asked: dict[str, Any], labels: dict[str, str] | None, options: dict[str, Any], weights: Weights | None
) -> Recipe:
    """What the command's parameters ask for; ``options`` of the method, or ``weights`` that bring their own."""
    from fusecli.training import recipe, targets
    from fusecli.training.loop import Settings

    usual, smoothing = recipe.pace(labels is not None, options), asked["label_smoothing"]
    objective = partial(
        targets.objective,
        labels,
        where=asked["labels"],
        task=str(asked["task"] or Task.classify),
        text_dropout=asked["text_dropout"] or 0.0,
        smoothing=recipe.SMOOTHING if smoothing is None else smoothing,
        balanced=asked["class_weights"] is not None,
    )
    beginning = partial(recipe.from_scratch, asked["feature_dim"], asked["seed"], options)
    if weights:
        beginning = partial(recipe.from_checkpoint, weights, asked["weights"])
    settings = Settings(
        epochs=asked["epochs"] or usual.epochs,
        batch_size=asked["batch_size"],
        lr=usual.lr if asked["lr"] is None else asked["lr"],
        weight_decay=asked["weight_decay"],
        patience=asked["patience"] or usual.patience,
        seed=asked["seed"],
        device=asked["device"],
        bfloat16=asked["bfloat16"],
    )
    return recipe.Recipe(objective, beginning, settings, asked["validation"], asked["held_out"])
