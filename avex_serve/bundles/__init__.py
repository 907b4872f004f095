"""A bundle on disk: what it holds, its reading and its writing."""
