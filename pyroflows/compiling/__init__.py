"""Functions of tensors recorded once and run without Python in between: an optional executor."""
