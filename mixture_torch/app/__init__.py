"""The demo and its command line; nothing else in the package imports them."""
