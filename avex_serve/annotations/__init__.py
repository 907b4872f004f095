"""Formats of annotations: who labelled what, when, in which recording."""
