"""The attention backend and what it plans per forward pass."""
