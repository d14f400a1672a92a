"""The samples are scripts, run from their own folder: none of them is imported to look for examples in docstrings."""

collect_ignore_glob = ["*/train.py"]
