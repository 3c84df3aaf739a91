"""`swba-infer bench`: this project beside its peers, in one process, after a correctness gate."""
