"""The inputs and answers that a bundle carries, and their comparison."""
