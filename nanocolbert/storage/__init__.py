"""What lies on disk: artifacts, ragged arrays, tab-separated text, runs."""
