"""Sources of objects in memory."""
