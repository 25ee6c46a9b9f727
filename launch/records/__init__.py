"""The logs and descriptions that a run writes."""
