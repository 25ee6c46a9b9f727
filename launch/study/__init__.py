"""Studies: many runs, each tuned with the same budget, and a comparison of their results."""
