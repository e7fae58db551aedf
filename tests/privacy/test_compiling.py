"""Compiled code is that of a fresh process, whatever was compiled before."""

from __future__ import annotations

import pytest
import torch

from e2h.privacy.compiling import compiled


@pytest.mark.slow
def test_many_compiled_functions_are_each_new_to_the_compiler():
    def scale(factor: float):
        return compiled(lambda x: x * factor)

    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for factor in (2.0, 3.0, 4.0):
            assert torch.equal(scale(factor)(torch.ones(3)), torch.full((3,), factor))


@pytest.mark.slow
def test_every_shape_has_a_graph_of_its_own():
    function = compiled(lambda x: x + 1)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for size in (3, 5, 7):  # otherwise the second would be compiled for all sizes, and the third would use it
        function(torch.ones(size))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 3
