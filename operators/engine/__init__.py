"""The batching engine: requests in, completions out; it knows tokens, not pictures."""
