"""Trained networks: exported, imported, loaded, and images drawn from them."""
