"""A model on the Hub: from its name to its files, byte ranges, downloads, uploads."""
