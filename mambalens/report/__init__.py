"""One page of a sweep."""
