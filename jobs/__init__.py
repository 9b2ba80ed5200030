"""Asking: the command line, job specs and benchmarks."""
