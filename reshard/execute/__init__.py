"""Carrying out a plan: reading ranges, writing files, taking digests, and surviving interruptions.

`ready` checks the output directory, `run` works through a whole plan, `fill` writes one file, and `sources` reads files
in large blocks, notices if they change, and leaves in memory what `page_cache` found there. `fetching` does the same
with ranges of `checkpoint.remote`, several at a time. `checksums` compares files with what was downloaded, and `holes`
finds what was never written. `journal` remembers which files are complete, `destination` looks after the output
directory, `reflink` finds out whether blocks can be shared, `syscalls` wraps what the operating system offers,
`id_tables` maps tensors whose values are expert ids, and `new_file` creates a small file. In comes a `Plan`; out come
files and their `FileRecord`s. Which bytes go where was decided in `plan`.
"""
