"""Measures of a training run that the loss alone does not show."""

from symdist.diagnostics.router import RouterMonitor

__all__ = ["RouterMonitor"]
