"""Routing: from a model and a recipe to param groups."""
