"""Collectives: what is sent between ranks, and how it is packed."""
