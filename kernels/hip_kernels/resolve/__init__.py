"""Which wanted pages the device holds, which slots the others take, and their copy there."""
