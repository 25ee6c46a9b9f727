"""The command `symdist` and what it uses: previews, plans, benchmarks, reports, and example models."""
