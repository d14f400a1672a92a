"""Output: console, text, numbers and exit codes."""
