"""What floating-point results depend on beside the inputs: what of it is fixed, and what is part of a release's name.

A replay is free only where it gives the same bits; on another kind of machine it is another release, and is charged.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from e2h.binding import digest
from e2h.curriculum.environment import check_float32, kernel_switches


@contextmanager
def fixed_kernels() -> Iterator[None]:
    """While the block runs, torch computes each sum in one order and in full float32; then the caller's settings again.

    One thread, so that sums inside a kernel have one order. No TF32 or bfloat16 in place of float32, but where the
    configuration asks for it: last bits of 2^-11 are more than the clip leaves free (docs/guarantee.md, section 10). No
    kernels chosen by the clock.

    Raises:
      InputError: if an environment variable replaces float32.
    """
    check_float32()
    cudnn, threads, dtype = torch.backends.cudnn, torch.get_num_threads(), torch.get_default_dtype()
    switches: list[tuple[Any, str, object]] = [
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
        (cudnn, "enabled", True),
        (torch.backends.mkldnn, "enabled", True),
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
        (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    ]
    switches += [(one, "fp32_precision", "ieee") for one in _float32_operations()]
    before = [getattr(holder, name) for holder, name, _ in switches]
    older = [_or_none(torch.get_float32_matmul_precision), _or_none(lambda: cudnn.allow_tf32)]
    try:
        _set_older("highest", False)
        for holder, name, value in switches:
            setattr(holder, name, value)
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        _set_older(*older)
        for (holder, name, _), value in zip(switches, before, strict=True):
            setattr(holder, name, value)


def _float32_operations() -> list[Any]:
    backends: Any = torch.backends
    found = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    return [*found, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]


def _set_older(matmul: str | None, tf32: bool | None) -> None:
    """The same by torch's older names: who reads one that disagrees with the newer is told off by an exception."""
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if tf32 is not None:
        torch.backends.cudnn.allow_tf32 = tf32


def _or_none(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:  # the caller has set it by the newer names
        return None


def machine(*also: object) -> str:
    """Digest of the processor, the numerical libraries, and whatever else is given."""
    libraries = [version(name) for name in ("torch", "numpy", "opacus")]
    with suppress(PackageNotFoundError):
        libraries.append(version("triton"))
    libraries += [str(torch.version.cuda), str(torch.backends.cudnn.version())]
    return digest([_processor(), *kernel_switches(), *libraries, *(str(one) for one in also)])


def _processor() -> list[str]:
    """Model and vector instructions: kernels choose their order of sums by them."""
    found = [platform.machine(), platform.processor()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = ("model name", "flags", "Features", "CPU part")
        found += sorted({line for line in cpuinfo.read_text().splitlines() if line.startswith(names)})
    return found
