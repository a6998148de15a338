"""The same data and budget for every method: what each costs and gives."""
