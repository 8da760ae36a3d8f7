"""Built-in policy documents."""
