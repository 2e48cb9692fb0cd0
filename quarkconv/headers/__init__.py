"""Header bytes -> Checkpoint: checked columns of names, types and offsets."""
