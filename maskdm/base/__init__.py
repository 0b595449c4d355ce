"""What needs nothing else of ours: errors, seeds, hashes, locks, progress, signals, files that appear whole."""
