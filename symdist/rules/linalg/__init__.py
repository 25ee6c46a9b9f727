"""Linear algebra that the rules need: inverse roots and orthonormal columns."""
