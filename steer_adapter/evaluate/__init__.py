"""What a vector does, in numbers and pictures."""
