"""Who sits where, and the wires between them."""
