"""Secure DP-SGD in an ordinary Opacus script: `SecureDPOptimizer` in place of Opacus' own optimiser.

python docs/opacus_example.py
"""

import secrets
import warnings

import numpy as np
import torch
from sklearn.datasets import load_digits

from e2h.privacy.accounting import epsilon
from e2h.privacy.dpsgd import grad_sample_module
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.keys import derive_key
from e2h.privacy.optimizer import SecureDPOptimizer
from e2h.privacy.sampling import poisson_mask

warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus' hooks need no input gradients
pixels, digits = load_digits(return_X_y=True)
images, labels, ids = torch.tensor(pixels / 16).float(), torch.tensor(digits), np.arange(len(digits))
event = PoissonSampledGaussian(sampling_prob=0.1, noise_multiplier=1.5, count=100)
secret = secrets.token_bytes(32)  # whoever has it can subtract the noise

network = grad_sample_module(torch.nn.Linear(64, 10))
optimizer = SecureDPOptimizer(
    torch.optim.SGD(network.parameters(), lr=1.0),
    noise_multiplier=event.noise_multiplier,
    max_grad_norm=1.0,
    expected_batch_size=event.sampling_prob * len(images),  # public, never the drawn number
    noise_key=lambda step: derive_key(secret, "noise", step),
)
for step in range(event.count):
    drawn = poisson_mask(derive_key(secret, "sampling"), step, ids, event.sampling_prob)
    optimizer.begin_step(int(drawn.sum()))
    torch.nn.functional.cross_entropy(network(images[drawn]), labels[drawn]).backward()
    optimizer.step()

accuracy = (network(images).argmax(1) == labels).float().mean()
print(f"epsilon {epsilon([Release('train', event)], 1e-5).epsilon:.3f} at delta 1e-5; training accuracy {accuracy:.3f}")
