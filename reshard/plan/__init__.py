"""What to write: output files as lists of byte ranges of the source. Pure data, no I/O.

`files` defines a plan and its parts. `layouts` decides which tensor goes into which file and in which order, also so
that tensors can share disk blocks with the source; `extents` finds the bytes that can, and `sharing` holds whether they
will, which `execute.reflink` finds out. `fetches` merges ranges of remote files into requests. In come a `Checkpoint`,
a `MoeModel` and a `Placement`; out comes a `Plan`. `execute` carries it out.
"""
