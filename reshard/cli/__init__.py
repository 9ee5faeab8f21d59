"""The command line: parses options, calls `commands`, prints what they return.

`main` has the group and the commands that write or check weights, `look` those that only look, `options` the options
that several share, `render` and `render_look` the text and JSON of reports (the tables of `analyze` are
`traffic.report`'s, because its page shows them too), and `progress` the bars. Errors become one line and an exit status
here, and nowhere else.
"""
