"""What one update does, from a batch to new moments; no file on disk is touched here."""
