"""Rows: what travels between steps and what a run writes. Imports nothing of ours."""
