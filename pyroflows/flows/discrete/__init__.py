"""Flows of sequences of categories."""
