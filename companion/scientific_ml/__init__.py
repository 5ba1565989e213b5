"""Scientific machine learning: networks against the honest baseline of each science."""
