"""One thread: small problems gain nothing from more, and busy machines lose a lot."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from torch import nn

from e2h.evaluation.inception import Convolution, InceptionV3


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="session")
def digits():
    """Images uint8 [1797, 8, 8, 1] and labels, shuffled."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return (data.images[order] * 255 / 16).astype(np.uint8)[..., None], data.target[order]


def random_inception() -> InceptionV3:
    """Weights at which activations neither vanish nor explode, so that every layer has a part in the features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = InceptionV3()
        for part in model.modules():
            if isinstance(part, Convolution):
                nn.init.kaiming_normal_(part.conv.weight)
                part.bn.weight.uniform_(0.8, 1.2)
                part.bn.bias.normal_(0, 0.1)
                part.bn.running_mean.normal_(0, 0.1)
                part.bn.running_var.uniform_(0.8, 1.2)
    return model


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory) -> tuple[str, str]:
    """A file of random weights, written as the published one (the format before zip files), and its SHA-256."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(random_inception().state_dict(), path, _use_new_zipfile_serialization=False)
    return str(path), hashlib.sha256(path.read_bytes()).hexdigest()
