"""Ways to write weights: one file each, and the tables that name them."""
