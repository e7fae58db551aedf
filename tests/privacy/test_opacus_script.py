"""`SecureDPOptimizer` in an ordinary Opacus script does what Opacus' own optimiser does, but for the noise."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from e2h.errors import InputError
from e2h.privacy.dpsgd import grad_sample_module
from e2h.privacy.keys import derive_key
from e2h.privacy.optimizer import SecureDPOptimizer

SECRET = bytes(range(32))
SIGMA, CLIP, BATCH = 2.0, 0.5, 10.0
# Opacus' hooks run although no input needs gradients; torch says so.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def flat(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


class OpacusScript:
    """An ordinary Opacus loop over `grad_sample_module`, as a user of Opacus writes it."""

    def __init__(self, make: Callable[[list[nn.Parameter]], DPOptimizer]) -> None:
        network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        generator = torch.Generator().manual_seed(1)
        for parameter in network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.images = torch.randn(40, 6, generator=generator) * 3
        self.labels = torch.randint(3, (40,), generator=generator)
        self.network = grad_sample_module(network)
        self.optimizer = make(list(self.network.parameters()))

    def begin(self, num_examples: int) -> None:
        if isinstance(self.optimizer, SecureDPOptimizer):
            self.optimizer.begin_step(num_examples)

    def backward(self, places: slice) -> None:
        nn.functional.cross_entropy(self.network(self.images[places]), self.labels[places]).backward()

    def step(self, *batches: slice) -> Tensor:
        """One logical step over physical batches, as Opacus' BatchMemoryManager cuts it; returns the change."""
        before = flat(self.network)
        self.begin(sum(places.stop - places.start for places in batches))
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
        script.begin(12)
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


def test_what_an_interrupted_step_accumulated_does_not_enter_the_next():
    interrupted, undisturbed = OpacusScript(secure), OpacusScript(secure)
    interrupted.begin(9)
    interrupted.optimizer.signal_skip_step(True)
    interrupted.optimizer.signal_skip_step(True)  # never used up
    interrupted.backward(slice(0, 4))
    interrupted.optimizer.step()
    assert torch.equal(interrupted.step(slice(2, 9)), undisturbed.step(slice(2, 9)))


def test_a_step_that_was_not_begun_or_lost_examples_releases_nothing():
    script = OpacusScript(secure)
    before = flat(script.network)
    script.backward(slice(0, 4))
    with pytest.raises(RuntimeError, match="expected begin_step"):
        script.optimizer.step()
    script.begin(5)
    script.backward(slice(0, 4))
    with pytest.raises(RuntimeError, match="counters"):
        script.optimizer.step()
    assert torch.equal(flat(script.network), before)


def test_no_step_is_made_twice_by_one_optimiser():
    optimizer = OpacusScript(secure).optimizer
    optimizer.step_private(0, 0)
    optimizer.step_private(4, 0)
    for step in (0, 3, 4):
        with pytest.raises(RuntimeError, match="was made before"):
            optimizer.step_private(step, 0)


def test_settings_that_bound_nothing_are_refused():
    parameters = [nn.Parameter(torch.zeros(3))]
    for changes in ({"noise_multiplier": 0.0}, {"noise_multiplier": float("inf")}, {"max_grad_norm": 0.0}):
        settings = {
            "noise_multiplier": 1.0,
            "max_grad_norm": 1.0,
            "expected_batch_size": 4,
            "noise_key": bytes,
            **changes,
        }
        with pytest.raises((ValueError, InputError), match=next(iter(changes))):
            SecureDPOptimizer(torch.optim.SGD(parameters, lr=1.0), **settings)


def test_a_network_that_opacus_does_not_accept_is_refused():
    with pytest.raises(InputError, match="expected layers that Opacus accepts"):
        grad_sample_module(nn.Sequential(nn.BatchNorm1d(3)))


def test_strided_activations_are_clipped_as_contiguous_ones():
    """Opacus 1.6 alone gets the gradients of a convolution wrong where its input is strided."""
    images = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    samples = []
    for format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        module = grad_sample_module(nn.Conv2d(4, 5, 1))
        module(images.contiguous(memory_format=format)).square().sum().backward()
        samples.append(next(module.parameters()).grad_sample)
    assert torch.allclose(*samples, rtol=1e-4, atol=1e-4)


def test_the_opacus_example_runs(capsys):
    example = Path(__file__).parents[2] / "docs" / "opacus_example.py"
    runpy.run_path(str(example))
    found = re.fullmatch(r"epsilon (\S+) at delta 1e-5; training accuracy (\S+)\n", capsys.readouterr().out)
    assert found
    assert float(found[1]) == pytest.approx(3.536, abs=0.001)
    assert float(found[2]) > 0.8
