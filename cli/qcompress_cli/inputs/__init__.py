"""Options, project config and opening the model: everything that a command reads before it works."""
