"""Planning: where each rule runs, and what it costs."""
