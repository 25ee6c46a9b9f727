"""The engines that shard and step the model, one folder each."""
