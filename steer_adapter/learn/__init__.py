"""Methods that learn steering vectors, one a file."""
