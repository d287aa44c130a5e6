"""Trainable prompts and their initialisers."""
