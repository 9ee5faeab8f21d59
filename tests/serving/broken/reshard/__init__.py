"""Stands before the real package on the path of one test: an installation that does not import."""

raise ImportError("this installation of reshard is broken, for a test")
