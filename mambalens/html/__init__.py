"""How things show themselves in notebooks."""
