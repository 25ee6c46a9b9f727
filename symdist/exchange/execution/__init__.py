"""Execution of a step: jobs, and the scheduler that runs them wave by wave."""
