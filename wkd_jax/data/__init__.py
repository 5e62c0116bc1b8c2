"""Data sets, the batches made from them, and the augmentation that runs on the device."""
