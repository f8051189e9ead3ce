"""Adapters of others, and one's own for others: looked at, loaded several at once, pushed to the Hub."""
