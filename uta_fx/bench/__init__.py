"""Benchmarks: correctness first, ratios against the best dense kernel, errors beside them."""
