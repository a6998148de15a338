"""What a run will take on a machine that need not be here."""
