"""The only importer of ray: session, assessment trials, data-parallel training."""
