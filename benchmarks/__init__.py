"""What is measured at length, outside the tests."""
