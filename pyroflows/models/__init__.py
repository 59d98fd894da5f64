"""What pyroflows knows of a Pyro model: its structure, its runs for batches of draws, and its log joint."""
