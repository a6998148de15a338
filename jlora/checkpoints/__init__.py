"""Everything that is read from or written to disk, one format a module."""
