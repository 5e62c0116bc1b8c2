"""One file a setting; arguments choose the row."""
