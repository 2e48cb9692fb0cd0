"""The verb convert: from a model and a target to a plan, and from a plan to a finished conversion."""
