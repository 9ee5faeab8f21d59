"""What lies on disk or on the Hub: a checkpoint directory, its index, its safetensors headers and its config.

`source` turns what the user calls the source into `Files`, by the scheme of its URL: those of a directory (`files`), or
of the Hugging Face Hub or an object store (`remote`, which has the table of stores). `directory` reads these into a
`Checkpoint`: files, headers and tensors, each tensor with its file, offset and size. `weights` knows which files hold
weights, `lfs` knows Git's pointers, `header` reads, checks and writes the header of a safetensors file, and a
`Location` is a path or a URL. In comes a path or a URL; out comes a sound `Checkpoint`, or a `CheckpointError`. A
checkpoint is made without tensor data. All requests to the Hub and to buckets are `remote`'s, also those for tensor
data, which `execute` asks for; the store's library repeats them. Nothing here knows what an expert is: that is `model`.
"""
