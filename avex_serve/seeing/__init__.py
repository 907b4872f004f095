"""Sounds as pictures, clips and pages."""
