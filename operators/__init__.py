"""Work: a table in, a table out. No Ray, no clock, no environment."""
