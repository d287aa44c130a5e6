"""What is optimised, and how it starts."""
