"""Files and folders of features: their facts, formats, shards and readers."""
