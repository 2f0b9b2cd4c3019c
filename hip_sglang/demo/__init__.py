"""The built-in retrieval model and the program that finds quotes with it."""
