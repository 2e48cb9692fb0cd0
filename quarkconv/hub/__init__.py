"""A model on the Hub: locate, repo, ranges, read_ahead, http, errors, download, push."""
