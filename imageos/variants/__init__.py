"""The variants that a node offers and could offer: taken from the catalog, fetched, tried."""
