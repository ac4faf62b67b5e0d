"""The ops: tensors in, tensors out. Nothing here knows models or names."""
