"""The verdict on a fit: whether its draws can be used as they are, and what to do if not."""
