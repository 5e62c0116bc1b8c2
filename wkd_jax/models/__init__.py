"""Networks, one family a file, and the connectors between them."""
