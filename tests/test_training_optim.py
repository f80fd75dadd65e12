"""The optimizers of a training, and what they are given."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusecli import checkpoint
from fusecli.training.loop import HEAD_LR, Lesson, Settings, _Run
from fusecli.training.match import Match
from fusecli.training.objective import Classes
from fusecli.training.represent import Fusion

UNGUARDED = """
import sys, torch
from fusecli.training import optim

def learned(kinds):
    x = torch.nn.Parameter(torch.linspace(-1, 1, 6))
    def closure():
        optimizer.zero_grad()
        loss = (x - 3).pow(4).sum()
        loss.backward()
        return loss
    for name, options in (("AdamW", {"lr": 0.1, "fused": True}), ("LBFGS", {"line_search_fn": "strong_wolfe"})):
        optimizer = getattr(kinds, name)([x], **options)
        for _ in range(3):
            optimizer.step(closure)
            if name == "AdamW":  # the other is never kept
                optimizer.load_state_dict(optimizer.state_dict())
    return x.detach()

ours = learned(optim)
assert "torch._dynamo" not in sys.modules
assert torch.equal(ours, learned(torch.optim))
"""


def test_optimizers_learn_as_torchs_do_without_its_compiler() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", UNGUARDED], check=True)


def test_the_decay_is_of_matrices_and_as_strong_for_those_of_another_size() -> None:
    settings = Settings(epochs=1, batch_size=4, lr=1e-3, weight_decay=0.1, patience=1, seed=0, device="cpu")
    fusion = Fusion(checkpoint.init(8, 2, method="gated", layer_norm=True))
    objective = Classes(torch.arange(8) % 2, ["a", "b"], 0.0, 0.0, None)
    rows = SimpleNamespace(length=lambda at: 2)
    data: Any = SimpleNamespace(images=rows, texts=rows, cost=lambda at: 4, parts={"train": list(range(8))})
    run = _Run(fusion, Lesson(objective, data, settings, {"image_proj.weight": 4.0}))
    groups = run.optimizer.param_groups
    assert {group["initial_lr"] for group in groups} == {1e-3, 1e-3 * HEAD_LR, 1e-3 / 4}
    for name, parameter in fusion.named.items():
        [group] = [group for group in groups if any(parameter is learned for learned in group["params"])]
        decay = group["initial_lr"] * group["weight_decay"]
        assert decay == pytest.approx(1e-4 if parameter.ndim > 1 else 0), name


def test_the_image_of_a_text_is_told_from_those_of_the_closest_texts() -> None:
    match = Match(8)
    match.group = 2
    torch.manual_seed(0)
    middles = torch.eye(8)
    texts = torch.cat([middles, middles + 0.01])[torch.randperm(16)]
    for one, other in match._groups(texts).tolist():
        torch.testing.assert_close(texts[one], texts[other], atol=0.011, rtol=0)
