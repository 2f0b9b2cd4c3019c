"""Pages to summaries."""
