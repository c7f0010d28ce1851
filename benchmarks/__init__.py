"""Benchmarks: `python -m benchmarks` measures, checks and writes JSON; see `python -m benchmarks -h`."""
