"""Companion of the book "Deep Networks through a Linear Lens".

One module per paper, in the package of its theme, and a few rooms that they share:
``claims``, ``data``, ``models``, ``plotting``, ``runtime`` and ``training``.
"""
