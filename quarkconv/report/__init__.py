"""What inspect and verify found, as one HTML file."""
