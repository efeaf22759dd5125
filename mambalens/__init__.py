"""mambalens."""
