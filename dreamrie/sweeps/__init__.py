"""Many trainings from one file: what is trained (`plan`), on an engine (`running`), and what came out (`table`)."""
