"""A weight as a product of thin ones: numbers only, no graphs."""
