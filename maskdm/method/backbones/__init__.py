"""The networks, and how one is built from params."""
