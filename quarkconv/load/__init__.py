"""The verb load: the experts of a layer as tensors, from any layout."""
