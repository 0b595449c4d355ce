"""Benchmarks: measurements that take too long for the tests. `python -m benchmarks` runs them."""
