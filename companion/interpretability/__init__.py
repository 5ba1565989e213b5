"""Interpretability: what a network says about its own reasons."""
