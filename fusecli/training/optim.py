"""torch's optimizers as they are, without the compiler that each would load first.

They guard some of their methods against `torch.compile`, and import all of it to do so, which takes 2 to 3 s the first
time: more than a short training. `functools.wraps` keeps what a guard is laid around, and nothing is compiled here.
That of `AdamW.step` also turns gradients off.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


def _unguarded(method: Callable[..., Any]) -> Callable[..., Any]:
    unwrapped: Callable[..., Any] = inspect.unwrap(method)
    return unwrapped


class AdamW(torch.optim.AdamW):
    """Loshchilov and Hutter 2019."""

    add_param_group = _unguarded(torch.optim.AdamW.add_param_group)
    zero_grad = _unguarded(torch.optim.AdamW.zero_grad)
    state_dict = _unguarded(torch.optim.AdamW.state_dict)
    load_state_dict = _unguarded(torch.optim.AdamW.load_state_dict)
    step = torch.no_grad()(_unguarded(torch.optim.AdamW.step))


class LBFGS(torch.optim.LBFGS):
    """Liu and Nocedal 1989."""

    add_param_group = _unguarded(torch.optim.LBFGS.add_param_group)
    zero_grad = _unguarded(torch.optim.LBFGS.zero_grad)
