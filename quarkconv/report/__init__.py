"""The results of inspect and verify as one HTML file."""
