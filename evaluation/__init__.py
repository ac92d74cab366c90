"""Measuring lens blur: benchmarks, metrics, protocols; ``python -m evaluation --help``."""
