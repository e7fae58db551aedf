"""Utility of the synthetic images on real data: train on synthetic, test on real, and a Frechet distance.

Everything measured here touches real data without noise: it is sensitive and never part of a release.
"""
