"""What `/metrics` tells, and how it is counted."""
