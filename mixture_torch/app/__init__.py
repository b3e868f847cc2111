"""The demo and its command line, over the rest of the package and never under it."""
