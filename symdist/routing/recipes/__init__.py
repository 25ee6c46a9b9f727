"""Recipes: which rule each parameter role gets, one TOML file per recipe, and the code that reads them."""

from symdist.routing.recipes.load import Recipe, RecipeLike, load_recipe, recipe_names, schedule_key
from symdist.routing.recipes.overrides import parse_overrides, parse_value

__all__ = ["Recipe", "RecipeLike", "load_recipe", "parse_overrides", "parse_value", "recipe_names", "schedule_key"]
