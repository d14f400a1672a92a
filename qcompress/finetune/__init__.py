"""Training with the quantizers of the papers: attach, train, finalize."""
