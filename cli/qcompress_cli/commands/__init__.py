"""One command per file, each with its report."""
