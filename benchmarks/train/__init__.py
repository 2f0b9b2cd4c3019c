"""A small Llama trained from nothing: attention that nobody constructed, to judge methods on."""
