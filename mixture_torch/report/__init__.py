"""Reports on run folders: records, verdicts in plain words, figures, a page and a view for the terminal."""
