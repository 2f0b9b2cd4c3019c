"""Queries and summaries to the pages that are attended exactly."""
