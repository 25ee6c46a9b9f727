"""Recipes: stacks of rules, one TOML file each, and how they are read."""

from symdist.recipes.load import Recipe, RecipeLike, load_recipe, recipe_names

__all__ = ["Recipe", "RecipeLike", "load_recipe", "recipe_names"]
