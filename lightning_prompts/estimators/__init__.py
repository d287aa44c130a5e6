"""How the learning signal gets through discrete tokens."""
