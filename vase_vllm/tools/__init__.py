"""Command-line tools; no server needs them."""
