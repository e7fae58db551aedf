from __future__ import annotations

import pytest
import torch
from torch import nn

from e2h.diffusion.ema import EMA


def constant(value: float) -> nn.Linear:
    network = nn.Linear(2, 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)
    return network


def value(ema: EMA) -> float:
    network = constant(99.0)
    ema.copy_to(network)
    values = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    assert bool((values == values[0]).all())
    return float(values[0])


def test_decay_warms_up_and_then_stays():
    ema, expected = EMA(constant(0.0), 0.5), 0.0
    for n in range(1, 31):
        ema.update(constant(float(n)))
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert value(ema) == pytest.approx(expected, rel=1e-5)


def test_average_is_apart_from_the_network():
    network = constant(1.0)
    ema = EMA(network, 0.9)
    with torch.no_grad():
        network.weight.fill_(7.0)
    assert value(ema) == 1.0
    assert not any(average.requires_grad for average in ema.parameters.values())


def test_resumed_average_equals_the_uninterrupted(tmp_path):
    whole, first = EMA(constant(0.0), 0.9), EMA(constant(0.0), 0.9)
    for n in range(5):
        whole.update(constant(n))
        first.update(constant(n))
    torch.save(first.state_dict(), tmp_path / "ema.pt")
    second = EMA(constant(50.0), 0.9)
    second.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    for n in range(5, 9):
        whole.update(constant(n))
        second.update(constant(n))
    assert value(whole) == value(second)


@pytest.mark.parametrize("other", [nn.Linear(2, 4), nn.Linear(2, 3, bias=False), nn.Sequential(nn.Linear(2, 3))])
def test_an_average_of_another_network_is_refused(other):
    ema = EMA(constant(1.0), 0.9)
    with pytest.raises(ValueError, match="another network"):
        ema.load_state_dict(EMA(other, 0.9).state_dict())
    assert value(ema) == 1.0
