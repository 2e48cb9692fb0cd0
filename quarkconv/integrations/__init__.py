"""quarkconv inside other projects' pipelines."""
