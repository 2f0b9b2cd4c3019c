"""Finds each model's best settings: what to prune in which layer."""
