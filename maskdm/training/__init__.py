"""Training: the loop, the optimizer, exact resume, devices and ranks."""
