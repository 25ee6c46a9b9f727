"""Measures of a training run that the loss alone does not show."""

from symdist.diagnostics.router import RouterMonitor
from symdist.diagnostics.steps import StepMonitor

__all__ = ["RouterMonitor", "StepMonitor"]
