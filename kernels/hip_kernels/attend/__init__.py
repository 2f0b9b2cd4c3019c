"""Queries, keys, values and a selection to outputs."""
