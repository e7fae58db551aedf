"""The five names are there, documented, and loaded only when asked for."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys

import pytest

import e2h
import e2h.api

NAMES = ["audit", "load_release", "plan", "recompute_epsilon", "run"]


def fresh(script: str) -> list[str]:
    """The words that a script prints in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.split()


def test_e2h_alone_loads_nothing_and_the_names_load_neither_ray_nor_hydra_nor_torch():
    shown = (
        "print(*sorted({name.split('.')[0] for name in sys.modules} & {'numpy', 'pyarrow', 'torch', 'ray', 'hydra'}))"
    )
    assert fresh(f"import sys, e2h; e2h.__version__; {shown}") == []
    assert fresh(f"import sys; from e2h import {', '.join(NAMES)}; {shown}") == ["numpy", "pyarrow"]


def test_there_are_five_names():
    assert e2h.__all__ == NAMES
    assert set(NAMES) <= set(dir(e2h))
    assert [getattr(e2h, name) for name in NAMES] == [getattr(e2h.api, name) for name in NAMES]
    with pytest.raises(AttributeError, match="module 'e2h' has no attribute 'trian'"):
        _ = e2h.trian


@pytest.mark.parametrize("name", NAMES)
def test_each_is_typed_and_says_what_it_takes_and_refuses(name):
    function = getattr(e2h, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for argument, parameter in signature.parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty
        assert f"  {argument}: " in function.__doc__
    assert "Raises:\n      InputError: " in function.__doc__


@pytest.mark.slow
def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(e2h.api) == doctest.TestResults(failed=0, attempted=3)
