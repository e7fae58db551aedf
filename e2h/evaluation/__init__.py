"""Utility of the synthetic images on real data: classifiers trained on them, distances to real images, copies.

Everything measured here touches real data without noise: it is sensitive and never part of a release.
"""
