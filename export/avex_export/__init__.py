"""The exporter: from a trained probe to a bundle."""
