"""The manifest: what was done, in enough detail to verify the output and to restore the source.

`manifest` defines `reshard_manifest.json`, reads and writes it, and keeps its JSON schema. It holds the source's
files and headers, the placement, the contract and every digest. It does not look at the files that it describes,
except to find them: that is `commands.verify`.
"""
