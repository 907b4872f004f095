"""Which request works when, and what it may use."""
