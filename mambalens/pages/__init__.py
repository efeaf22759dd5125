"""HTML: how things show themselves in notebooks, and the report of a sweep."""
