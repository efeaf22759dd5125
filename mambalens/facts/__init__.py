"""Facts: what they are, the files they come from, and how a model reads them."""
