"""Datasets: from any source to sharded uint8 arrays, and back as batches."""
