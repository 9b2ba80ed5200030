"""Benchmarks: each prints one table and one JSON line."""
