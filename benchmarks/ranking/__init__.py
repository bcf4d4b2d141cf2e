"""How well scores rank teachers: a heterogeneous zoo, tasks, and the students that each teacher really makes."""
