"""One rank of one stage: the model's arithmetic on one device. Knows nothing of requests' fates, text or Ray (but `worker_actor`)."""
