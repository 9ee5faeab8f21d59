"""Where experts go: pure functions of numbers, and the contract that an engine must keep.

`permutations` has zigzag and its inverse, `strategies` what a user may ask for, `balance` (with `swaps`) the search for
a placement that suits recorded traffic. That search minimizes the time that `time_model` predicts for the batches in
`steps`, from a GPU's profile in `gpus.json`. `contract` has what a group-limited output tells the engine. `copies` says
where copies of experts go (`spare` for all layers), and `copy_choice` which copy serves a batch. `placement_file` is
the JSON form of a placement, and `layer_names` finds out which layer a name means. In come a `MoeShape` and loaded
traffic; out comes a `Placement`: physical_to_logical [E] for each MoE layer. Nothing here reads a checkpoint or knows a
weight. The vLLM plugin builds on this package and on no other but `traffic.trace_file`.
"""
