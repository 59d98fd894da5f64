"""Networks whose Lipschitz constants are bounded, and what bounds them."""
