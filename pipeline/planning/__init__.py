"""What a run will take before it runs: sizes, bytes, seconds and cost on this or a described cluster."""
