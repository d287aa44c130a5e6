"""Networks that generate a prompt for each question from the hidden states of the frozen LM."""
