"""What a user can do: one module for each command, and what several of them need.

`original` reads the checkpoint that `--src` names. `outline` decides what becomes of it: the files of the output, what
is refused, and with `notes` what the user should know. `resharding` goes on from there to every byte. `writing` carries
that out, `merge` does so for several runs in one directory, and `on_ray` on a cluster; `earlier` finds what is already
done. The commands: `place`, `stage` and `restore` write;
`verify` (with `compare`) checks, `inspect`, `analyze` (with `page`) and `trace_info` describe, `export` writes a
placement for an engine, in one of the forms of `engine_files`, and `upload` publishes an output, with a `card`.
`serving` has the lines that serve the result. Each takes plain values, calls the packages below in order, and returns a
frozen dataclass. Parsing and printing are `cli`'s.
"""
