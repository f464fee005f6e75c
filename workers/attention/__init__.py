"""How one layer reads and writes the paged KV cache, behind one interface."""
