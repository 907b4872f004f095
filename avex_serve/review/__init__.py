"""What people review next, and what they decide."""
