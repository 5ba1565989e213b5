"""Collapse: features, codes and blocks that become simpler than they need to be."""
