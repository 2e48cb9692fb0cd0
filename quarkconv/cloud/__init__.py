"""A model in an object store: its listing and byte ranges, through obstore (extra ``cloud``)."""
