"""Basics that need nothing else of maskdm: errors, seeds, hashes, locks, progress, signals, atomic writing."""
