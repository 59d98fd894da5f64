"""The search for where a fit starts: points of finite density, separate modes, and a Gaussian at each."""
