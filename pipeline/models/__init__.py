"""Teachers, the zoo that lists them, where their weights come from, and students."""
