"""Small real models and data for examples and benchmarks."""
