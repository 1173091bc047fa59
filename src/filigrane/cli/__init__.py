"""The command line: one file per command, no statistics and no secrets of its own."""
