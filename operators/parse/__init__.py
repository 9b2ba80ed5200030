"""Model text to typed rows."""
