"""Recorded routing, and what a placement would make of it.

`trace_file` is the form of reshard's own recordings, `recordings` reads those and other engines' records, `choices`
turns them into the experts that each token chose, ids_TK per layer, and `effect` measures a placement on these.
`step_time` predicts how long steps take, and `advice` recommends a placement. `analysis` holds all that, `report` makes
the tables and sentences of `analyze`, and `page.html` draws its figures from what `page` writes into it. In come a
directory of recordings, or a checkpoint's gates, and a placement; out comes an `Analysis`. Recording itself is done by
`vllm.recording`, and making placements by `placement`.
"""
