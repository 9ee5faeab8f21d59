"""What to write: output files as lists of byte ranges of the source. Pure data, no I/O.

`files` defines a plan and its parts, `layouts` decides which tensor goes into which file and in which order,
`extents` finds the bytes that can share disk blocks with the source, and `sharing` says whether they will. In come a
`Checkpoint`, a `MoeModel` and a `Placement`; out comes a `Plan`. `execute` carries it out.
"""
