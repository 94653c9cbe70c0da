"""What tests and benchmarks share: tolerances, poison, cases."""
