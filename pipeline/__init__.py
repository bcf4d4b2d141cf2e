"""Faculty: one small student from a repository of heterogeneous pre-trained teachers."""
