"""What happens to gradients before a rule sees them: redistribution, checks, clipping and momentum."""
