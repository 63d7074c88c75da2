"""What trains, and how it comes back into a program."""
