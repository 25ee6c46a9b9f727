"""A study: many runs, tuned and set side by side."""
