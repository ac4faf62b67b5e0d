"""EWC in training frameworks: a module each, which imports its framework; none is imported by ``import ewc_fast``."""
