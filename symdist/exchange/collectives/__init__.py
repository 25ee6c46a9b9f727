"""Communication between ranks: how data is packed, and which collectives send it."""
