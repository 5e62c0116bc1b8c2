"""Metrics over whole data sets, as sums that add up over batches and hosts; and of class similarities."""
