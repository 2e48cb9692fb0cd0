"""A plan as pure data: output shards made of tensors, tensors made of pieces of source files; and the manifest."""
