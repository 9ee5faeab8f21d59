"""What a user can do, one module for each command.

`original` reads the checkpoint that `--src` names, and `resharding` decides how it becomes an output, with `notes` on
what the user should know of it; `place`, `stage` and `restore` write, unless `earlier` finds that all is done; `verify`
(with `compare`) checks, `inspect`, `analyze` (with `page`) and `trace_info` describe, `export` writes a placement for
an engine, in one of the forms of `engine_files`, and `upload` publishes an output, with a `card`. Each takes plain
values, calls the packages below in order, and returns a frozen dataclass. Parsing and printing are `cli`'s.
"""
