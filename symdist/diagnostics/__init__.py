"""Measurements of a training run that the loss does not show."""

from symdist.diagnostics.router import RouterMonitor
from symdist.diagnostics.steps import StepMonitor

__all__ = ["RouterMonitor", "StepMonitor"]
