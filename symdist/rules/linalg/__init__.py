"""Linear algebra of the rules: inverse roots and orthonormal columns."""
