"""Which write comes next: make before break, as a pure function."""
