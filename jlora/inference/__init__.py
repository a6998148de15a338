"""Generation with a key-value cache, and scoring of what was generated."""
