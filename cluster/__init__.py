"""The driver's side: decides, never computes. No torch here; Ray only in `ray_executor` and `driver_actor`."""
