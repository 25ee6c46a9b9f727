"""Execution of a step: the jobs, and the scheduler that runs them wave by wave."""
