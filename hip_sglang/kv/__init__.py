"""Where keys, values and their summaries live."""
