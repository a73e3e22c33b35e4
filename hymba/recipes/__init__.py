"""A run is a Python function that returns its settings; a variant is base plus one line."""
