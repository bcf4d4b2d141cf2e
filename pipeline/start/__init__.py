"""A new user's first file: looks at images and weights, and writes settings with comments."""
