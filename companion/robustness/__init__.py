"""Robustness: what a network tolerates, and how that is proved."""
