"""The compressed model, and the folder that it is saved in."""
