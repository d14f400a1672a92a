"""Sources of files that torch.save wrote, read without running anything."""
