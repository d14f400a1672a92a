"""The command line: options, reports and exit codes; it holds no arithmetic."""
