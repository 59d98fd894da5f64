"""A Pyro model as data: its structure, its runs for a batch of draws, its log joint."""
