"""`SecureDPOptimizer` in an ordinary Opacus script does what Opacus' own optimiser does, but for the noise."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from e2h.privacy.keys import derive_key
from e2h.privacy.optimizer import SecureDPOptimizer

SECRET = bytes(range(32))
SIGMA, CLIP, BATCH = 2.0, 0.5, 10.0
# Opacus' hooks run although no input needs gradients; torch says so.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def flat(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


class OpacusScript:
    """An ordinary Opacus loop over `GradSampleModule`, as a user of Opacus writes it."""

    def __init__(self, make: Callable[[list[nn.Parameter]], DPOptimizer]) -> None:
        network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        generator = torch.Generator().manual_seed(1)
        for parameter in network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.images = torch.randn(40, 6, generator=generator) * 3
        self.labels = torch.randint(3, (40,), generator=generator)
        self.network = GradSampleModule(network)
        self.optimizer = make(list(self.network.parameters()))

    def backward(self, places: slice) -> None:
        nn.functional.cross_entropy(self.network(self.images[places]), self.labels[places]).backward()

    def step(self, *batches: slice) -> Tensor:
        """One logical step over physical batches, as Opacus' BatchMemoryManager cuts it; returns the change."""
        before = flat(self.network)
        for number, places in enumerate(batches):
            self.optimizer.signal_skip_step(number < len(batches) - 1)
            self.optimizer.zero_grad()
            self.backward(places)
            self.optimizer.step()
        return flat(self.network) - before


def secure(parameters: list[nn.Parameter], sigma: float = 1e-6) -> SecureDPOptimizer:
    inner = torch.optim.SGD(parameters, lr=1.0)
    settings = {"max_grad_norm": CLIP, "expected_batch_size": BATCH}
    return SecureDPOptimizer(
        inner, noise_multiplier=sigma, noise_key=lambda step: derive_key(SECRET, "noise", step), **settings
    )


def opacus(parameters: list[nn.Parameter]) -> DPOptimizer:
    inner = torch.optim.SGD(parameters, lr=1.0)
    return DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=CLIP, expected_batch_size=BATCH)


@pytest.mark.parametrize("batches", [(slice(0, 9),), (slice(0, 4), slice(4, 4), slice(4, 20)), (slice(3, 3),)])
def test_in_an_opacus_script_it_does_what_opacus_does(batches):
    """Apart from the noise (here tiny) and the 2^-10 of the clip norm that pays for rounding."""
    for _ in range(2):
        ours, theirs = OpacusScript(secure).step(*batches), OpacusScript(opacus).step(*batches)
        assert torch.allclose(ours, theirs, rtol=2e-3, atol=1e-5)
        assert batches[0].start == batches[0].stop or theirs.norm() > 0.01


def test_in_an_opacus_script_gradients_accumulate_as_in_opacus():
    changes = []
    for make in (secure, opacus):
        script = OpacusScript(make)
        before = flat(script.network)
        script.backward(slice(0, 5))
        script.backward(slice(5, 12))
        script.optimizer.step()
        changes.append(flat(script.network) - before)
    assert torch.allclose(*changes, rtol=2e-3, atol=1e-5)


def test_in_an_opacus_script_every_step_draws_its_own_noise_also_after_a_resume():
    def noise(script: OpacusScript) -> Tensor:
        return script.step(slice(0, 0))

    script = OpacusScript(lambda parameters: secure(parameters, SIGMA))
    first, saved, second = noise(script), script.optimizer.state_dict(), noise(script)
    assert not (first == second).any()
    resumed = OpacusScript(lambda parameters: secure(parameters, SIGMA))
    resumed.optimizer.load_state_dict(saved)
    assert torch.allclose(noise(resumed), second, atol=1e-5)
    with pytest.raises(KeyError):
        resumed.optimizer.load_state_dict(opacus(list(resumed.network.parameters())).state_dict())


def test_in_an_opacus_script_gradients_are_not_used_twice():
    script = OpacusScript(secure)
    script.step(slice(0, 5))
    with pytest.raises(ValueError, match="zero_grad"):
        script.optimizer.step()


def test_the_opacus_example_runs(capsys):
    example = Path(__file__).parents[2] / "docs" / "opacus_example.py"
    runpy.run_path(str(example))
    found = re.fullmatch(r"epsilon (\S+) at delta 1e-5; training accuracy (\S+)\n", capsys.readouterr().out)
    assert found
    assert float(found[1]) == pytest.approx(3.536, abs=0.001)
    assert float(found[2]) > 0.8
