"""What lies on disk: a checkpoint directory, its index, its safetensors headers and its config.

`source` turns what the user calls the source into a directory. `directory` reads that directory into a `Checkpoint`:
files, headers and tensors, each tensor with its file, offset and size. `weights` knows which files hold weights, `lfs`
knows Git's pointers, and `header` reads, checks and writes the header of a safetensors file. In comes a path; out comes
a sound `Checkpoint`, or a `CheckpointError`. Tensor data is never read here, and nothing here knows what an expert is:
that is `model`.
"""
