"""Ranks: connected, watched, and agreed with each other."""
