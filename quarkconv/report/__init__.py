"""The results of inspect, verify and evaluate as one HTML file; the series that charts on a terminal share."""
