"""The command line. Only the entry point imports it."""
