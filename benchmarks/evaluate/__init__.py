"""Asks tasks of a model behind the real server, under several presets, and compares."""
