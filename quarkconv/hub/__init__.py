"""From the name of a model to its files (:mod:`locate`); a repo or bucket of the Hub: ranges, downloads, uploads."""
