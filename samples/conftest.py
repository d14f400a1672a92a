"""Keeps pytest from collecting doctests in the samples: they are scripts that run from their own folder."""

collect_ignore_glob = ["*/train.py", "*/data.py", "hf_encoder/encoder.py"]
