"""Routing: turn a model and a recipe into param groups."""
