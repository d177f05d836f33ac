"""Slow dense fp64 references: explicit (out, in) matrices and full SVDs, written for reading."""
