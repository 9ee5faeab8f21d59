"""Which tensor belongs to which expert, and how the model routes.

`families` is the table of known model families: data, and the place to add one. A router tensor with a new name is one
more line there, with its role. `layers` sorts the tensors of a `Checkpoint` into MoE layers, `routing` reads the
routing rule from config.json, `names` takes tensor names apart, `router` computes the rule with PyTorch, and
`config_ids` maps expert ids inside config files, with `config_patterns` for globs and regular expressions. `sizes` has
how large the parts are, and `memory` what copies of experts take of a GPU. In comes a `Checkpoint`; out comes a
`MoeModel`. What is not known to be safe raises `UnsupportedError`. Where experts go is decided in `placement`.
"""
