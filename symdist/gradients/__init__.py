"""The processing of gradients before a rule uses them: redistribution, checks, clipping and momentum."""
