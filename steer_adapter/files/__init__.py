"""What an adapter's folder holds, read as if a stranger had written it."""
