"""Bytes to text, pixels and frames, in a process that may be killed."""
