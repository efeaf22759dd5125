"""Every edge at once: where a fact flows, found by attribution and certified by exact cuts."""
