"""The optimizers of a training."""

from __future__ import annotations

import subprocess
import sys

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
