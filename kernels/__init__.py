"""What the device runs; `ops` is the only door. Knows tensors, nothing of models, requests or processes."""
