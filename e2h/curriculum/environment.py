"""Environment variables by which numerical libraries choose kernels, hence last bits; this module imports no torch."""

from __future__ import annotations

import os

from e2h.config import expect

# These, and all of the families, but for what those print and where they keep files.
SWITCHES = ("ATEN_CPU_CAPABILITY", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
FAMILIES = ("CUBLAS_", "CUDNN_", "DNNL_", "MKL_", "ONEDNN_", "TORCHINDUCTOR_", "TRITON_")
NO_SWITCHES = ("_DIR", "_THREADS", "_VERBOSE", "_LOGDEST_DBG", "_LOGINFO_DBG", "_LOGLEVEL_DBG")
# They replace float32 inside oneDNN, whatever torch asks it for.
FLOAT32_MODES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")


def kernel_switches() -> list[str]:
    """The variables that are set and choose kernels, as name=value."""
    return [f"{name}={value}" for name, value in sorted(os.environ.items()) if _is_switch(name)]


def _is_switch(name: str) -> bool:
    return name in SWITCHES or (name.startswith(FAMILIES) and not name.endswith(NO_SWITCHES))


def check_float32() -> None:
    """Refuses what would turn float32 into less: it moves a record's clipped contribution by a hundredth of C.

    Raises:
      InputError: it can't be undone here, because oneDNN reads it once.
    """
    for name in FLOAT32_MODES:
        mode = os.environ.get(name, "strict")
        expect(mode.lower() == "strict", name, mode, "strict, or unset: sums in float32", "unset it on every machine")
