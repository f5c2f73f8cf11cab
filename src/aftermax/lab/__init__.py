"""Experiments: the same work for every system. Imports the library, never the other way round."""
