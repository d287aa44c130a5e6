"""Many runs side by side: seeds x methods x settings, and the tables that compare them."""
