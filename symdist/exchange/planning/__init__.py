"""Planning of a step: where each rule runs, and what it costs."""
