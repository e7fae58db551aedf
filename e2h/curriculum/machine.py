"""What floating-point results depend on beside the inputs.

A replay is free only where it gives the same bits; on another kind of machine it is another release, and is charged.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from e2h.binding import digest

# Choose other kernels, hence other last bits.
SWITCHES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")


def machine(*also: object) -> str:
    """Digest of the processor, the numerical libraries, and whatever else is given."""
    libraries = [version(name) for name in ("torch", "numpy", "opacus")]
    switches = [os.environ.get(name, "") for name in SWITCHES]
    return digest([_processor(), *switches, *libraries, *(str(one) for one in also)])


def _processor() -> list[str]:
    """Model and vector instructions: kernels choose their order of sums by them."""
    found = [platform.machine(), platform.processor()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = ("model name", "flags", "Features", "CPU part")
        found += sorted({line for line in cpuinfo.read_text().splitlines() if line.startswith(names)})
    return found
