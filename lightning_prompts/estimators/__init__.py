"""Gradient estimators for discrete tokens."""
