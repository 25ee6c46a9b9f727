"""Gradients on their way to a rule: put together, checked, clipped, and taken into the momentum."""
