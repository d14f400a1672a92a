"""One file per way to write a weight."""
