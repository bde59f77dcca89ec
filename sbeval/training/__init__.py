"""Training, and what it keeps."""
