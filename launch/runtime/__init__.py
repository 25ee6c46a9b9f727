"""The ranks of a run: connecting them, watching for hangs, and agreeing on errors."""
