"""Entry points: one module a stage, each a twin of a `faculty` command."""
