"""e2h: publishable synthetic images from private ones, with a proven (epsilon, delta) guarantee."""

__version__ = "0.1.0"
