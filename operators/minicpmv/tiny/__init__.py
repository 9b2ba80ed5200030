"""Tiny checkpoints of every member of the family, in the layout of the released ones, with random weights.

They run the whole pipeline in seconds and hold no knowledge: what they write means nothing. Each weight is a function
of its name and shape alone, so every machine makes the same models.
"""

from operators.minicpmv.tiny.write import write_tiny_model

__all__ = ["write_tiny_model"]
