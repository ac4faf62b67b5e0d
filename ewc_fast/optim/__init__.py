"""EWC in the optimizer."""
