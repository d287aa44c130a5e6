"""Networks that write a prompt for each question from the frozen LM's hidden states."""
