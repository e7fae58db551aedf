"""The auditable floor: what is released, what it costs, and the randomness behind it. Knows no Ray and no Hydra."""
