"""While training computes, torch's switches are ours; before and after they are the caller's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from e2h.curriculum import machine as machine_module
from e2h.curriculum.environment import SWITCHES, check_float32
from e2h.curriculum.machine import fixed_kernels, machine
from e2h.errors import InputError

CALLERS = {
    "nothing": "",
    "older names": "torch.set_float32_matmul_precision('medium'); torch.backends.cudnn.allow_tf32 = True",
    "newer names": "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "autocast": "torch.set_autocast_enabled('cpu', True); torch.set_default_dtype(torch.float64)",
    "others": "torch.backends.mkldnn.enabled = False; torch.backends.cudnn.benchmark = True; torch.set_num_threads(2)",
}
# In a process of its own: these are global, and torch tells off whoever mixes older and newer names.
SHOW = """
import torch
from e2h.curriculum.machine import fixed_kernels
backends = torch.backends
def read(get):
    try:
        return get()
    except RuntimeError:
        return "mixed"
def seen():
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    holders = backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv
    return [
        *(one.fp32_precision for one in holders),
        read(torch.get_float32_matmul_precision), read(lambda: backends.cudnn.allow_tf32),
        read(lambda: backends.cuda.matmul.allow_tf32), backends.mkldnn.enabled, backends.cudnn.benchmark,
        backends.cudnn.deterministic, torch.get_num_threads(), torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype() == torch.float32,
    ]
CALLER
before = seen()
with fixed_kernels():
    inside = seen()
assert seen() == before, (before, seen())
print(inside)
"""


@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
def test_whatever_the_caller_chose_training_computes_alike_and_gives_it_back(caller):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHOW.replace("CALLER", caller)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{['ieee'] * 5 + ['highest', False, False, True, False, True, 1, False, True]}"


def test_a_callers_autocast_changes_no_bit():
    left, right = torch.randn(64, 300), torch.randn(300, 64)
    with fixed_kernels():
        expected = left @ right
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(left @ right, expected)
        with fixed_kernels():
            assert torch.equal(left @ right, expected)
            with torch.autocast("cpu", torch.bfloat16):  # finetune.dtype=bfloat16 is the configuration's own wish
                assert (left @ right).dtype == torch.bfloat16


OF_FAMILIES = ["CUBLAS_WORKSPACE_CONFIG", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "TORCHINDUCTOR_LAYOUT"]


@pytest.mark.parametrize("name", [*SWITCHES, *OF_FAMILIES])
def test_a_switch_of_the_libraries_is_another_machine(name, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    before = machine()
    monkeypatch.setenv(name, "AVX2")
    assert machine() != before


def test_what_libraries_print_and_where_they_keep_files_is_no_other_machine(monkeypatch):
    before = machine()
    for name in ("MKL_NUM_THREADS", "ONEDNN_VERBOSE", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "2")
    assert machine() == before


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_an_environment_in_which_float32_is_not_float32_is_refused(name, monkeypatch):
    for fine in ("STRICT", "strict"):
        monkeypatch.setenv(name, fine)
        check_float32()
    monkeypatch.setenv(name, "BF16")
    with pytest.raises(InputError, match=f"{name}=BF16: expected strict, or unset"), fixed_kernels():
        pytest.fail("entered")


def test_other_libraries_are_another_machine(monkeypatch):
    before = machine()
    monkeypatch.setattr(machine_module.torch.backends.cudnn, "version", lambda: 91002)
    assert machine() != before
