"""Order: steps, the ledger, the sink, and Ray Data."""
