"""Engines: what shards the model, one folder each."""
