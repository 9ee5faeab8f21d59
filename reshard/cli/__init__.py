"""The command line: parses options, calls `commands`, prints what they return.

`main` lists the commands, and imports the one that is called: `outputs` has those that write or check weights, `look`
those that only look, `analyze` the one that compares placements, `publish` the one that sends them to the Hub. They
share `group`: an error becomes one line and an exit status there, and nowhere else. `options` has the options that
several share, and `reshard.arguments` parses values such as 5GB, for Python too. Results are text, made by `render` and
`render_look` (the tables of `analyze` are `traffic.report`'s, because its page shows them too), or with --json the
objects of `reports`, which `output.schema.json` describes. `terminal` breaks and colours lines on a terminal, and
formats help; `progress` has the bars.
"""
