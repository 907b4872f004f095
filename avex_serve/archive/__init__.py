"""Many recordings: what to run on them, the store of the results, and the tables that are made from it."""
