"""Sources of files that torch.export.save wrote, checked before torch reads them."""
