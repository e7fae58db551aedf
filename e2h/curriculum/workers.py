"""The group of processes that train together: in process, under torchrun, or under Ray Train alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# Gradients as whole multiples of 2^-36: integer sums don't depend on the order, hence not on the number of workers.
GRADIENT_GRID = 2.0**36

Result = TypeVar("Result")


@dataclass(frozen=True)
class Workers:
    """This process among `size` equals.

    Attributes:
      rank: 0 <= rank < size; rank 0 writes files.
      device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @staticmethod
    def current(device: torch.device | str = "cpu") -> Workers:
        """The default process group, or this process alone where there is none."""
        if dist.is_available() and dist.is_initialized():
            return Workers(dist.get_rank(), dist.get_world_size(), _numbered(device))
        return Workers(0, 1, _numbered(device))

    def sum_integers(self, values: Tensor) -> None:
        """Sums an int64 tensor over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(values)

    def distinct(self, digest: str) -> list[str]:
        """The different values among the workers' hexadecimal digests, sorted: the same list on every worker."""
        own = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.int64, device=self.device)
        rows = torch.zeros(self.size, len(own), dtype=torch.int64, device=self.device)
        rows[self.rank] = own
        self.sum_integers(rows)
        return sorted({bytes(row).hex() for row in rows.tolist()})

    def agree(self, digest: str, on: str) -> None:
        """Raises RuntimeError on every worker unless all hold the same hexadecimal digest.

        A group that starts while a worker of the one before still writes may read two states.
        """
        if len(self.distinct(digest)) > 1:
            raise RuntimeError(f"the workers of the group hold different {on}; the group must start anew")

    def all_or_none(self, check: Callable[[], Result]) -> Result:
        """What `check` returns here; what it raises on one worker ends all, before any of them goes on."""
        failure: Exception | None = None
        try:
            found = check()
        except Exception as error:
            failure = error
        verdicts = self.distinct("00" if failure is None else "01")
        if failure is not None:
            raise failure
        if len(verdicts) > 1:
            raise RuntimeError("a check failed on another worker, which says why")
        return found

    def sum_gradients(self, parameters: list[torch.nn.Parameter], units: list[Tensor]) -> None:
        """Writes to `grad` the sum of all units of all workers; bit-identical for any number of them.

        Args:
          units: of this worker, each `on_grid`.
        """
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.int64, device=self.device)
        for unit in units:
            total += unit
        self.sum_integers(total)
        summed = (total.double() / GRADIENT_GRID).float()
        for parameter, part in zip(parameters, summed.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)


def _numbered(device: torch.device | str) -> torch.device:
    """With its number: to a thread that is started later, a bare "cuda" would be the first."""
    found = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


def is_out_of_memory(error: Exception) -> bool:
    # The last is what torch says on a CPU.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def on_grid(gradients: Sequence[Tensor]) -> Tensor:
    """One unit's gradients as one int64 vector; rounded unit by unit, so that it doesn't matter who has which."""
    flat = torch.cat([gradient.flatten() for gradient in gradients]).double()
    return (flat * GRADIENT_GRID).round().to(torch.int64)
