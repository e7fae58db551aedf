"""Code that is made for a machine when it first runs, so that it is the same in every process on that kind of machine.

A release is made again after a fault, by another process or worker, under the same noise: with other last bits, the two
would show a difference without noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

try:
    from e2h.privacy import kernels
except ModuleNotFoundError as error:  # torch's builds for CPUs bring no Triton
    if error.name != "triton":
        raise
    kernels = None  # type: ignore[assignment]

__all__ = ["compiled", "kernels"]

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """`function` through `torch.compile`, as one graph for each shape.

    Inductor chooses among kernels by the clock unless it is told not to. It also makes other code of a function that it
    has met before: for any shape, or, after eight, none at all. A code object of its own is always new to it.
    """

    def own(*arguments: object) -> object:
        return function(*arguments)

    own.__code__ = own.__code__.replace()
    return torch.compile(own, fullgraph=True, dynamic=False, options={"deterministic": True})  # type: ignore
