"""What a sweep found: its table, its folder, its intervals."""
