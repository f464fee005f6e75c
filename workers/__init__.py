"""One rank of one stage: the model's arithmetic on one device.

Knows nothing of requests' fates, of text, or of Ray (but for `worker_actor`).
"""
