"""What a user can do, one module for each command.

`original` reads `--src`, and `resharding` decides how it becomes an output; `place`, `stage` and `restore` write,
`verify` (with `compare`) checks, `inspect`, `analyze` (with `page`) and `trace_info` describe, and `export` writes a
placement for another engine. Each takes plain values, calls the packages below in order, and returns a frozen
dataclass. Parsing and printing are `cli`'s.
"""
