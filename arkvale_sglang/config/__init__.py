"""Settings and the errors a user can meet; imports nothing of ours but the standard library."""
