"""qkrope inside other libraries. Nothing is imported before it is asked for."""
