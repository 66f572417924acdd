"""What `eval --measures` computes from features and classes: retrieval, few-shot, clusters, one row a class."""
