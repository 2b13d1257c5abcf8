"""Benchmarks: shapes, data, timing, baselines, the memory sweep, records, plots and tables."""
