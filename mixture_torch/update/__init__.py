"""The mixture that an estimator keeps, updated by one batch after another. Nothing here touches a disk."""
