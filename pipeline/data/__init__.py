"""Image tables (Arrow, memory-mapped), where their samples come from, and how they are split."""
