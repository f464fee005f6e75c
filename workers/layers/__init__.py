"""Parallel layers: they know about ranks, models do not."""
