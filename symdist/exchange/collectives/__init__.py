"""Collectives: what moves between ranks, and how it is packed."""
