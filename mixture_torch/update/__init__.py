"""One update, from a batch to new moments. Nothing here touches a disk."""
