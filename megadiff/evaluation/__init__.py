"""What a model is worth: its bound on held-out text, and the text it writes."""
