"""Options, project config and opening the model: what a command reads before it works."""
